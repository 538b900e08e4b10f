"""Peak memory of a call, from torch's allocator."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object]) -> int:
    """Largest sum of what `call` has allocated and not yet freed on the CPU at any time, in bytes.

    The allocator reports every tensor to torch's profiler, temporary ones inside kernels included.
    What was allocated before counts where it is freed: it is then less than 0. In a process
    that was forked after torch had been imported the profiler is told nothing.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    recorded = profiler.profiler
    assert recorded is not None and recorded.kineto_results is not None
    events = [
        (event.start_ns(), event.nbytes())  # pyright: ignore[reportAttributeAccessIssue]
        for event in recorded.kineto_results.events()
        if event.name() == "[memory]"
    ]
    assert events, "the profiler saw no memory: was this process forked from one that has torch?"
    live = peak = 0
    for _, num_bytes in sorted(events, key=lambda event: event[0]):
        live += num_bytes
        peak = max(peak, live)
    return peak
