"""The one exception that means: the user's input is wrong."""


class InputError(Exception):
    """A mistake in a configuration, a file or an argument.

    The message is one line that names the file, key or argument at fault. The command line prints it
    without a traceback and exits with status 2.
    """
