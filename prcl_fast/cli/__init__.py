"""The command line."""

import os

# PyTorch's C++ code would repeat on standard error what the command prints in one line. The variable is read
# when torch is imported.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
