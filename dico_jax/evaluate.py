r"""Measures images: FID, sFID, Inception Score, precision, recall, KID, CLIP score.

python -m dico_jax.evaluate --samples=DIR|FILE.npz --reference=FILE.npz|DIR [--out=FILE.json]
    Images in a folder or in arr_0 of an .npz file.
python -m dico_jax.evaluate --ckpt=DIR --reference=FILE.npz|DIR [--num_samples=50000 ...]
    Samples of a checkpoint, straight into the numbers, on all devices.
python -m dico_jax.evaluate --ckpt=DIR --reference=FILE.npz --sweep_cfg=1.0:2.0:0.1 --out=FILE.json
    The same for every guidance scale from 1.0 to 2.0, with a plot beside FILE.json.
python -m dico_jax.evaluate --samples=DIR --clip=PATH [--prompts=FILE] [--reference=...]
    The CLIP score of images that `sample --prompts` wrote, with DIR/prompts.txt.
python -m dico_jax.evaluate --ckpt=DIR --prompts=coco_uvit:captions_val2014.json --reference=...
    Samples of a model that is told a text, of captions as a protocol of MS-COCO draws them.

With --out the same command goes on after an interruption. docs/evaluation.md explains the numbers.
"""

from typing import Any

from absl import flags

from dico_jax import cli
from dico_jax.errors import UsageError
from dico_jax.sampling import flags as sampler_flags

_SAMPLES = flags.DEFINE_string("samples", None, "Folder of pictures, or .npz file with arr_0.")
_CKPT = flags.DEFINE_string(
    "ckpt", None,
    "Workdir of a run, a converted checkpoint, or a file of PyTorch weights; also hf://OWNER/REPO.",
)  # fmt: skip
_REFERENCE = flags.DEFINE_string(
    "reference", None,
    "What is compared with: an .npz file of ADM, of pytorch-fid or of `prepare reference`, or a "
    "folder of pictures. The CLIP score needs none.",
)  # fmt: skip
_OUT = flags.DEFINE_string("out", None, "JSON file for the result and how it was made.")
_METRICS = flags.DEFINE_list(
    "metrics", None,
    "Some of fid, sfid, inception_score, precision_recall, kid, clip_score [all that the reference "
    "allows, and the last with --clip].",
)  # fmt: skip
_FEATURES = flags.DEFINE_string(
    "features", "inception",
    "Network that makes the features: inception, or the file of a classifier (prepare classifier).",
)  # fmt: skip
_INCEPTION = flags.DEFINE_string(
    "inception", None, "Weights of the Inception network [the cache, then the public release]."
)
_CLIP = flags.DEFINE_string(
    "clip", None,
    "CLIP with both towers, for clip_score: a folder as transformers writes it, a file in one, of "
    "`convert clip`, or hf://OWNER/REPO/FILE. The texts are the --prompts; of --samples, the lines "
    "of that file [prompts.txt in the folder].",
)  # fmt: skip
_NUM_SAMPLES = flags.DEFINE_integer(
    "num_samples",
    None,
    "Number of images [all of --samples; of --ckpt 50,000, or a protocol's].",
    2,
    10_000_000,
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images at a time.", lower_bound=1)
_MAX_BAD = cli.define_fields({"max_bad_fraction": "data.max_bad_fraction"})["max_bad_fraction"]
_SWEEP_CFG = flags.DEFINE_string(
    "sweep_cfg", None, "--ckpt: guidance scales from:to:step, such as 1.0:2.0:0.1."
)

_JOIN = cli.define_distributed_flags()
for _module in (cli, sampler_flags):
    flags.adopt_module_key_flags(_module)  # so that --help shows them


def main() -> None:
    """Measures, prints and writes."""
    if (_SAMPLES.value is None) == (_CKPT.value is None):
        raise UsageError("give either --samples or --ckpt: what is to be measured")
    if _SAMPLES.value is not None:
        for name in (*sampler_flags.NAMES, "sweep_cfg"):
            if flags.FLAGS[name].present and name != "prompts":
                raise UsageError(f"--{name} is for --ckpt, not for --samples")
    if _SWEEP_CFG.value is not None and (flags.FLAGS["cfg_scale"].present or _OUT.value is None):
        raise UsageError("--sweep_cfg needs --out, for its result and plot, and no --cfg_scale")
    # Late imports: --help answers before JAX is imported.
    from dico_jax.evaluation import measure
    from dico_jax.sampling.prompts import number_of_images

    metrics = tuple(_METRICS.value) if _METRICS.value else None
    how: Any = _FEATURES.value, _INCEPTION.value, metrics, _BATCH_SIZE.value, _MAX_BAD.value
    how = *how, _CLIP.value, flags.FLAGS["prompts"].value
    given: Any = _REFERENCE.value, measure.Options(*how), _OUT.value
    if _CKPT.value is not None:
        measure.check_sampled(*given, sweep_cfg=_SWEEP_CFG.value)
    sampler_flags.use_all_cores(_CKPT.value)  # which may fetch the weights
    _JOIN()
    if _SAMPLES.value is not None:
        measure.evaluate_files(_SAMPLES.value, *given, num_samples=_NUM_SAMPLES.value)
        return
    choices = sampler_flags.sampler_arguments(_BATCH_SIZE.value) | {"sweep_cfg": _SWEEP_CFG.value}
    asked = sampler_flags.asked()
    count = _NUM_SAMPLES.value or number_of_images(asked.get("prompts", "")) or 50_000
    choices |= {"asked": asked, "num_samples": count}
    measure.evaluate_checkpoint(str(_CKPT.value), *given, **choices)


if __name__ == "__main__":
    cli.run(main)
