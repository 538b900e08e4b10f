"""Names for the memory in which the ranks of an engine on a CPU add up what they computed.

vLLM names it after the address that its processes meet at. Under torchrun that is the same in every
run: two runs on a machine would meet in it, and what a killed run leaves behind would keep the next
from starting. Here an engine has a name of its own, and only until all of its ranks are there: then
the memory ends with the processes, however these end.
"""

# vLLM lives in an environment of its own, which pyright does not see.
# pyright: reportMissingImports=false

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from gdpo_megatron.distributed.mesh import EngineMesh

FOLDER = Path("/dev/shm")
"""Where Linux shows shared memory that has a name."""


@contextmanager
def own_names(mesh: EngineMesh) -> Iterator[None]:
    """Start an engine of vLLM on a CPU within; collective over its ranks."""
    if mesh.tp_size == 1:
        yield
        return
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    told = [f"gdpo_megatron-{secrets.token_hex(8)}"]
    dist.broadcast_object_list(told, group=mesh.tp_group, group_src=0)
    usual = _CPUSHMDistributed.make_group_name

    def own(communicator: Any) -> str:
        return f"{told[0]}-{usual(communicator).replace('/', '')}"

    _CPUSHMDistributed.make_group_name = staticmethod(own)
    try:
        yield
    finally:
        _CPUSHMDistributed.make_group_name = staticmethod(usual)
        for path in FOLDER.glob(f"{told[0]}*"):
            path.unlink(missing_ok=True)  # another rank of the engine may be first
