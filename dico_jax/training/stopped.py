"""The end of a run that cannot go on."""


class TrainingStopped(Exception):  # noqa: N818  it says what has happened
    """Training has ended itself for a reason that no flag was wrong about.

    The message is a single line: what happened, what is safe, and what to do. The commands print it
    without a traceback and exit with status 1 (see `dico_jax.cli`).
    """
