"""The exceptions that end a command with one line and without a traceback."""


class InputError(Exception):
    """A mistake in a configuration, a file or an argument.

    The message is one line that names the file, key or argument at fault. The command line prints it
    without a traceback and exits with status 2.
    """


class RunError(RuntimeError):
    """A run cannot go on. The message is one line; the command line prints it and exits with 1."""
