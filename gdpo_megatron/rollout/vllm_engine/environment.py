"""How vLLM must be started to live in the trainer's processes.

vLLM reads most of it from variables when it is imported.
"""

from __future__ import annotations

import os

VARIABLES = {
    # In this process: tensors pass by reference, and no process is left behind.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # vLLM would bind its threads to cores that the other ranks use too: 10 to 20 times slower.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
"""What the user has set wins, but for the first."""


def prepare() -> None:
    """Set the variables; call before vLLM is imported."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    name = "VLLM_ENABLE_V1_MULTIPROCESSING"
    os.environ[name] = VARIABLES[name]
