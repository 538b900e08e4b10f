"""What a run really holds, in the plan's words."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def measured_state(policy: Any) -> dict[str, int]:
    """Bytes of a rank's parameters, gradients and optimizer state, asked of the tensors.

    Args:
        policy: a MegatronPolicy.

    Returns:
        "parameters" and "gradients", those of Megatron's buffers (and of parameters in none), and
        "optimizer": main weights, where parameters have fewer bits, and both moments.
    """
    buffers: list[Any] = [
        buffer for ddp in policy.ddp for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers)
    ]
    frozen = [p for it in policy.chunks for p in it.parameters() if not p.requires_grad]
    parameters = sum(it.param_data.nbytes for it in buffers if it.param_data is not None)
    main = policy.config.params_dtype.itemsize < 4
    optimizer = sum(
        parameter.numel() * (12 if main else 8)
        for group in policy.optimizer.param_groups
        for parameter in group["params"]
    )
    return {
        "parameters": parameters + sum(p.nbytes for p in frozen),
        "gradients": sum(it.grad_data.nbytes for it in buffers),
        "optimizer": optimizer,
    }


def peak_bytes(call: Callable[[], object]) -> int:
    """Largest sum of the tensors that operations of `call` made and that are alive, in bytes.

    Storages are watched by weak references, so whoever frees one is seen. torch's profiler is not
    asked: it misses what another thread frees, as gloo's do after a collective, and then counts it
    as alive for ever. What a kernel allocates for itself is not seen here.
    """
    with LiveBytes() as live:
        call()
    return live.peak


class LiveBytes(TorchDispatchMode):
    """See `peak_bytes`; for a block instead of a call.

    Attributes:
        peak: bytes so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {_key(it) for it in tree_leaves((args, kwargs)) if isinstance(it, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and _key(tensor) not in before | self._seen.keys():
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                gone = partial(self._freed, key, size)
                self._seen[key] = weakref.ref(storage, gone)
                self.now += size
                self.peak = max(self.peak, self.now)
        return out

    def _freed(self, key: int, size: int, _: object) -> None:
        del self._seen[key]
        self.now -= size


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
