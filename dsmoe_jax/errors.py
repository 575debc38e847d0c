"""The exception for invalid input: `DSMoEError`."""


class DSMoEError(ValueError):
    """Invalid input of the user; the message is one line that names the argument, the value and what is allowed.

    The command line prints it and exits with code 2. Any other exception except `OSError` is a bug.
    """
