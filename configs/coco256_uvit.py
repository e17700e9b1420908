r"""DiCo with text on MS-COCO at 256x256 in the protocol of U-ViT (arXiv 2209.12152).

    python -m dico_jax.main --config=configs/coco256_uvit.py --workdir=DIR \
        --config.data.path=LATENTS --config.model.dtype=bfloat16

Data: LATENTS made by `python -m dico_jax.prepare latents --crop=lanczos --nomirrored --text=...`
    of the 82,783 training pictures of COCO 2014, see docs/data.md.
Hardware: GPUs or a TPU slice (not measured yet).
Slice: v5e:2x2 --config.model.dtype=bfloat16
Expected: U-ViT-S/2 has FID 5.95 and its deep variant 5.48 so; no number of DiCo is published.
Evaluation: the FID belongs to 30,000 samples of shuffled validation captions and the Inception of
    pytorch-fid. It does not compare with that of configs/coco256.py. U-ViT samples by 50 steps of
    DPM-Solver++ of order 3, where this config has 250 ancestral steps.
"""

from dico_jax.configs import default


def get_config():
    config = default.get_config()
    config.data.crop = "lanczos"
    config.data.horizontal_flip = False
    config.autoencoder.scaling_factor = 0.23010
    config.model.name = "TextDiCo-S"
    config.model.text_fusion = "dwc"
    config.model.text_dropout_prob = 0.1
    config.optimizer.learning_rate = 2e-4
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.9
    config.optimizer.weight_decay = 0.03
    config.optimizer.warmup_steps = 5_000
    config.training.num_steps = 1_000_000
    config.sampling.cfg_scale = 2.0
    config.sampling.cfg_channels = "all"
    return config
