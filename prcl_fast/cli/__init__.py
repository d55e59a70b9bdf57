"""The command line."""

import getpass
import logging
import os
import signal

import typer.core

# Help and errors as plain text: Rich would take brackets in them for markup, and is slow to import.
typer.core.HAS_RICH = False

# PyTorch's C++ code would repeat on standard error what the command prints in one line, and its profiler
# would report start and end. The variables are read when torch is imported.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
# Figures are drawn without a display. A notebook names a backend here that its own environment alone has, and
# importing matplotlib would fail.
os.environ["MPLBACKEND"] = "agg"
# Its remarks on a folder of settings that cannot be written: it uses a temporary one.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
# The caches of torch.compile have the user's name, which an unknown user of a container lacks.
try:
    getpass.getuser()
except (KeyError, OSError):
    os.environ["USER"] = f"user-{os.getuid()}"


def start() -> None:
    """The entry point of the `prcl` script."""
    # Ctrl-C during the imports ends the process as the system does, without a traceback.
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if usual:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from prcl_fast.cli.main import main

    if usual:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
