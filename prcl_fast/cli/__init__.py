"""The command line."""

import logging
import os

import typer.core

# Help and errors as plain text: Rich would take brackets in them for markup, and is slow to import.
typer.core.HAS_RICH = False

# PyTorch's C++ code would repeat on standard error what the command prints in one line. The variable is read
# when torch is imported.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# Figures are drawn without a display. A notebook names a backend here that its own environment alone has, and
# importing matplotlib would fail.
os.environ["MPLBACKEND"] = "agg"
# Its remarks on a folder of settings that cannot be written: it uses a temporary one.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
