"""The fields of a config and their published values; configs/default.py says what they mean.

They are here too because configs/ is no part of the package. A test keeps the two equal.
"""

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
        "in_channels": 4,
        "num_classes": 1000,
        "class_dropout_prob": 0.1,
        "learn_sigma": True,
        "dtype": "float32",
    },
    "diffusion": {"diffusion_steps": 1000, "noise_schedule": "linear"},
    "optimizer": {
        "learning_rate": 1e-4,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,
    },
    "training": {
        "num_steps": 400_000,
        "ema_decay": 0.9999,
        "log_every_steps": 100,
        "checkpoint_every_steps": 10_000,
        "keep_checkpoints": 3,
        "init_from": None,
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
    "eval": {"class_agreement_samples": 0},
}
