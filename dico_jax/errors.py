"""The one exception type for what a user can mend."""


class UsageError(ValueError):
    """A wrong config field, flag, name, file or folder.

    The message is a single line that names the field or file, its value and the fix. The commands
    print it without a traceback and exit with status 2 (see `dico_jax.cli`).
    """
