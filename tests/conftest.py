"""What has to be set before the first test: how triton runs, and how many threads."""

import os

import torch

if not torch.cuda.is_available():  # before anything imports triton: its kernels run in the interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The tests' tensors are small, and pytest-xdist has a process for every core.
torch.set_num_threads(1)
