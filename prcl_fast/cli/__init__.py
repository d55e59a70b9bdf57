"""The command line."""

import os

# PyTorch's C++ parts say on standard error what the command says in one line. Read when torch is imported.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
