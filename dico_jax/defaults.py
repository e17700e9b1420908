"""The fields of a config and their published values; configs/default.py says what they mean.

They are here too because configs/ is no part of the package. A test keeps the two equal. A new
field's value must be what runs did before it was there: `with_defaults` gives it to their configs.
"""

from collections.abc import Mapping
from typing import Any

DEFAULTS: dict[str, Any] = {
    "seed": 0,
    "data": {
        "source": "latents",
        "path": None,
        "name": None,
        "split": "train",
        "image_size": 256,
        "batch_size": 256,
        "horizontal_flip": True,
        "exif_rotation": False,
        "latent_sampling": "sample",
        "max_bad_fraction": 0.001,
        "num_workers": 0,
        "verify_checksums": True,
        "cache_dir": None,
    },
    "autoencoder": {
        "name": "sd_vae",
        "path": "hf://stabilityai/sd-vae-ft-ema/diffusion_pytorch_model.safetensors",
        "dtype": "float32",
        "tile_size": 0,
    },
    "model": {
        "name": "DiCo-S",
        "hidden_size": None,
        "depth": None,
        "mlp_ratio": None,
        "num_heads": None,
        "patch_size": None,
        "depthwise": None,
        "attention": None,
        "in_channels": 4,
        "num_classes": 1000,
        "class_dropout_prob": 0.1,
        "learn_sigma": True,
        "dtype": "float32",
        "scan_blocks": False,
        "remat": "none",
    },
    "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "rules": ()},
    "diffusion": {"diffusion_steps": 1000, "noise_schedule": "linear"},
    "optimizer": {
        "name": "adamw",
        "learning_rate": 1e-4,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "warmup_steps": 0,
        "schedule": "constant",
        "min_learning_rate_ratio": 0.0,
        "clip_norm": 0.0,
        "weight_decay": 0.0,
        "weight_decay_mask": "all",
    },
    "training": {
        "num_steps": 400_000,
        "accumulation_steps": 1,
        "ema_decay": 0.9999,
        "ema_widths": (),
        "ema_snapshot_every_steps": 0,
        "log_every_steps": 100,
        "checkpoint_every_steps": 10_000,
        "keep_checkpoints": 3,
        "keep_every_steps": 0,
        "preemption_exit_status": 143,
        "init_from": None,
        "on_nan": "stop",
        "stall_warning_seconds": 600,
        "compilation_cache": "default",
    },
    "sampling": {
        "sampler": "ddpm",
        "num_steps": 250,
        "ddim_eta": 0.0,
        "cfg_scale": 1.4,
        "cfg_channels": "first_three",
        "batch_size": 64,
        "grid_every_steps": 10_000,
        "grid_rows": 8,
        "grid_columns": 8,
    },
    "eval": {
        "every_steps": 0,
        "num_samples": 1000,
        "metrics": ("fid", "inception_score"),
        "features": "inception",
        "inception": None,
        "reference": None,
        "class_agreement_samples": 0,
    },
    "profile": {"start_step": 0, "num_steps": 5},
    "logging": {"wandb_project": ""},
}


def with_defaults(
    config: Mapping[str, Any], defaults: Mapping[str, Any] = DEFAULTS
) -> dict[str, Any]:
    """The config of an older checkpoint with all fields; those it lacks have their defaults."""
    complete = dict(defaults) | dict(config)
    for name, default in defaults.items():
        if isinstance(default, dict):
            complete[name] = with_defaults(config.get(name, {}), default)
    return complete
