"""The one exception that means: the user's input is wrong, and the message says how."""


class DSMoEError(ValueError):
    """A user's mistake, in one line that names the thing, its value and what is allowed.

    The command line prints it and exits with code 2; every other exception but `OSError` is a bug.
    """
