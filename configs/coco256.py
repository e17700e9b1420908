r"""DiCo with text on MS-COCO at 256x256, as the paper trains it: in the setting of REPA.

    python -m dico_jax.main --config=configs/coco256.py --workdir=DIR --config.data.path=LATENTS \
        --config.model.dtype=bfloat16 [--config.model.text_fusion=cross_attention]

Data: LATENTS made by `python -m dico_jax.prepare latents --crop=lanczos --nomirrored --text=...` of
    the 82,783 training pictures of COCO 2014, as U-ViT and REPA have them, see docs/data.md.
Hardware: GPUs or a TPU slice (not measured yet).
Slice: v5e:2x2 --config.model.dtype=bfloat16
Expected: FID 4.93, with cross-attention 4.87 (paper, table 3; it does not say the size of the
    network, the text encoder nor the guidance scale: size S and ViT-L/14 are choices of ours).
Evaluation: the FID belongs to 40,192 samples of validation captions and ADM's evaluator. It does
    not compare with that of configs/coco256_uvit.py. The objective here is the published noise
    prediction, where REPA predicts velocities.
"""

from dico_jax.configs import default


def get_config():
    config = default.get_config()
    config.data.crop = "lanczos"
    config.data.horizontal_flip = False
    config.model.name = "TextDiCo-S"
    config.model.text_fusion = "dwc"
    config.model.text_dropout_prob = 0.1
    config.optimizer.learning_rate = 1e-4
    config.optimizer.clip_norm = 1.0
    config.training.num_steps = 150_000  # 400,000 overfit
    config.sampling.cfg_scale = 2.0
    config.sampling.cfg_channels = "all"
    return config
