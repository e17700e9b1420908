"""Training from Python, as `dico_jax.train`: in a script, a notebook, or a thread of one."""

import contextlib
import os
import signal
import threading

from ml_collections import ConfigDict

from dico_jax.config import check_fields
from dico_jax.evaluation.networks import ClassAgreement
from dico_jax.training import loop


def train(config: ConfigDict, workdir: str | os.PathLike) -> ClassAgreement | None:
    """Trains what `config` describes in `workdir`, or goes on from the newest checkpoint there.

    `Sampler.from_pretrained(workdir)` then makes images. In the main thread ^C saves a checkpoint
    first. What a run prints goes to stdout, its numbers to metrics.jsonl in the folder.

    Args:
      config: as a file in configs/ gives it, such as `dico_jax.configs.digits.get_config()`; it is
        left as it is.
      workdir: a folder for this run; it is made.

    Returns:
      What the classifier says of the final samples, where `config.eval.class_agreement_samples`
      asks for it; else None.

    Raises:
      UsageError: something in the config or the workdir cannot work; nothing is changed then.
      TrainingStopped: the run cannot go on, see `config.training.on_nan`.
      SystemExit: ^C or SIGTERM came; the state is saved.
    """
    config = config.copy_and_resolve_references()
    check_fields(config)
    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():  # a notebook may not end
            for number in (signal.SIGINT, signal.SIGTERM):
                stack.callback(signal.signal, number, signal.getsignal(number))
        return loop.train(config, os.fspath(workdir))
