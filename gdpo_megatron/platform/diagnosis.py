"""What speaks for and against a run on a machine: from `Facts` to the rows that `doctor` prints.

Nothing is looked at here, so that it can be read and tested for machines that are not here. The
rows about GPUs have been tested that way alone: no machine with one has run them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from gdpo_megatron.platform.findings import Finding, Level
from gdpo_megatron.platform.machine import Facts, Interface
from gdpo_megatron.platform.pins import OPTIONAL, rows

_GIB: Final = 1 << 30
_SMALL_SHARED_GIB: Final = 1
_FIRST_WITH_BF16: Final = (8, 0)  # Ampere
# To be avoided, by the notes of NVIDIA's resiliency extension.
_BAD_NCCL: Final = ((2, 28, 3), (2, 28, 8))


# ---- versions ------------------------------------------------------------------------------------


def versions(facts: Facts) -> Iterator[Finding]:
    """What is installed against the row of the table.

    Megatron-Core and vLLM have checks of their own.

    Args:
        facts: of the machine.
    """
    row = facts.row
    build = (
        f"torch is a build for CUDA {facts.toolkit}" if facts.toolkit else "torch is a CPU build"
    )
    yield Finding("version table", Level.OK, f"row {row.name}: {build}")
    for package, wanted in row.packages.items():
        if package in ("megatron-core", "vllm"):
            continue
        there = facts.torch if package == "torch" else facts.packages.get(package)
        if there is None:
            level = Level.NOTE if package in OPTIONAL else Level.FAIL
            why = f"; {OPTIONAL[package]}" if package in OPTIONAL else ""
            yield Finding(package, level, f"not installed{why}; the row has {package}{wanted}")
        elif row.has(package, there):
            yield Finding(package, Level.OK, there)
        else:
            text = f"{there}, but the row has {package}{wanted}; pip install '{package}{wanted}'"
            yield Finding(package, Level.FAIL, text)
    if facts.apex == "other":
        text = "a package of that name that is not NVIDIA's: pip uninstall apex; it is not needed"
        yield Finding("apex", Level.FAIL, text)
    elif facts.apex == "nvidia":
        yield Finding("apex", Level.OK, "NVIDIA's; not needed beside Transformer Engine")


# ---- hardware ------------------------------------------------------------------------------------


def hardware(facts: Facts) -> Iterator[Finding]:
    """GPUs, their driver, and whether this torch can use them.

    Args:
        facts: of the machine.
    """
    if facts.toolkit is None:
        if facts.devices:
            text = (
                f"{facts.devices} here, but torch is a CPU build, so runs use the CPU; "
                "GDPO_TORCH=cuda scripts/setup.sh takes the other"
            )
            yield Finding("GPUs", Level.NOTE, text)
        else:
            yield Finding("GPUs", Level.OK, "none, and torch is a CPU build: runs use the CPU")
        return
    yield _driver(facts)
    yield _gpus(facts)
    if facts.nccl is not None:
        yield _nccl(facts.nccl)


def _driver(facts: Facts) -> Finding:
    needed = rows()["gpu"].driver
    assert needed is not None
    if facts.driver is None:
        text = (
            f"none is loaded; install {needed} or newer, and start a container with its GPUs "
            "(docker run --gpus all)"
        )
        return Finding("GPU driver", Level.FAIL, text)
    if int(facts.driver.split(".")[0]) >= int(needed):
        return Finding("GPU driver", Level.OK, facts.driver)
    text = f"{facts.driver}; a build of torch for CUDA {facts.toolkit} needs {needed} or newer"
    # An image's compatibility package lets a data centre GPU run with an older driver.
    return Finding("GPU driver", Level.NOTE if facts.gpus else Level.FAIL, text)


def _gpus(facts: Facts) -> Finding:
    if facts.gpus:
        kinds = sorted({(it.name, it.capability, it.memory // _GIB) for it in facts.gpus})
        shown = "; ".join(
            f"{sum(it.name == name and it.memory // _GIB == gib for it in facts.gpus)} x {name}, "
            f"{gib} GiB, compute capability {major}.{minor}"
            for name, (major, minor), gib in kinds
        )
        if len(kinds) > 1:
            text = f"{shown}: not all alike, so the smallest and slowest sets the pace"
            return Finding("GPUs", Level.NOTE, text)
        return Finding("GPUs", Level.OK, shown)
    hidden = facts.variables.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        text = f"hidden by CUDA_VISIBLE_DEVICES={hidden!r}, so runs use the CPU; unset it"
        return Finding("GPUs", Level.NOTE, text)
    text = f"torch sees none ({facts.devices} in /dev): runs would use the CPU; see the driver"
    if hidden is not None:
        text += f", and CUDA_VISIBLE_DEVICES={hidden!r}"
    return Finding("GPUs", Level.FAIL, text)


def _nccl(version: tuple[int, ...]) -> Finding:
    shown = ".".join(map(str, version))
    first, last = _BAD_NCCL
    if first <= version[:3] <= last:
        bad = " to ".join(".".join(map(str, it)) for it in _BAD_NCCL)
        text = f"{shown}; {bad} are to be avoided: take the one that torch was built with"
        return Finding("NCCL", Level.NOTE, text)
    return Finding("NCCL", Level.OK, shown)


def precision(facts: Facts) -> Iterator[Finding]:
    """bfloat16, FP8 and Transformer Engine.

    Args:
        facts: of the machine, gathered with `try_imports`.
    """
    slow = [it.name for it in facts.gpus if it.capability < _FIRST_WITH_BF16]
    if slow:
        text = f"{slow[0]} computes it in float32, slowly; Ampere and newer have it"
        yield Finding("bfloat16", Level.NOTE, text)
    if facts.missing_for_fp8 is not None:
        text = f"precision.fp8 needs {facts.missing_for_fp8}; leave it null"
        yield Finding("FP8", Level.NOTE, text)
    elif facts.gpus:
        yield Finding("FP8", Level.OK, "precision.fp8 can be set: torch's own product runs")
    else:
        text = "precision.fp8 can be set; a CPU computes it in float32, for its numbers alone"
        yield Finding("FP8", Level.OK, text)
    there = facts.packages.get("transformer-engine")
    if facts.transformer_engine_problem is not None:
        text = (
            f"installed, but importing it fails ({facts.transformer_engine_problem}), and with it "
            "Megatron-Core; compile it against this torch (pip install --no-build-isolation "
            "--force-reinstall --no-deps transformer-engine-torch) or pip uninstall it"
        )
        yield Finding("layers", Level.FAIL, text)
    elif there is not None and facts.gpus:
        yield Finding("layers", Level.OK, f"Transformer Engine {there}")
    elif facts.gpus:
        text = f"Megatron-Core's own: Transformer Engine is not installed; {_row_wants(facts)}"
        yield Finding("layers", Level.NOTE, text)
    else:
        yield Finding("layers", Level.OK, "Megatron-Core's own: runs use the CPU")


def _row_wants(facts: Facts) -> str:
    wanted = facts.row.packages["transformer-engine"]
    return f"pip install --no-build-isolation 'transformer-engine[pytorch]{wanted}'"


# ---- network -------------------------------------------------------------------------------------


def network(facts: Facts) -> Iterator[Finding]:
    """What ranks on several nodes would talk through.

    Args:
        facts: of the machine.
    """
    outer = [it for it in facts.interfaces if it.reaches_others]
    for interface in outer:
        speed = f", {interface.megabits} Mb/s" if interface.megabits else ""
        text = f"{interface.address}{speed}"
        yield Finding(f"interface {interface.name}", Level.OK, text)
    if not outer:
        text = "none leads to other machines: jobs on one node only"
        yield Finding("interfaces", Level.NOTE, text)
    chosen = set()
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        value = facts.variables.get(variable)
        if value is None:
            continue
        chosen.add(variable)
        yield _chosen_interface(variable, value, facts.interfaces)
    wanted = {"GLOO_SOCKET_IFNAME"} | ({"NCCL_SOCKET_IFNAME"} if facts.gpus else set())
    if len(outer) > 1 and wanted - chosen:
        text = (
            f"{' and '.join(it.name for it in outer)}: for a job on several nodes set "
            f"{' and '.join(sorted(wanted - chosen))} to the one that they share"
        )
        yield Finding("interfaces", Level.NOTE, text)
    yield _host_name(facts, outer)
    if facts.adapters:
        active = [name for name, up in facts.adapters.items() if up]
        level = Level.OK if len(active) == len(facts.adapters) else Level.NOTE
        text = f"{len(active)} of {len(facts.adapters)} ports active: {', '.join(facts.adapters)}"
        yield Finding("InfiniBand", level, text)
        if facts.locked_memory is not None:
            text = f"{facts.locked_memory >> 10} KiB may be locked; RDMA needs ulimit -l unlimited"
            yield Finding("locked memory", Level.NOTE, text)
    elif facts.gpus:
        text = "none: between nodes NCCL uses TCP"
        yield Finding("InfiniBand", Level.NOTE, text)


def _chosen_interface(variable: str, value: str, there: tuple[Interface, ...]) -> Finding:
    """NCCL takes prefixes, exact names after `=`, and what to leave out after `^`; gloo names."""
    if value.startswith("^"):
        return Finding(variable, Level.OK, f"{value}: all but these")
    exact = value.startswith("=") or variable.startswith("GLOO")
    names = value.removeprefix("=").split(",")
    up = [it.name for it in there] + ["lo"]
    found = [it for it in up if any(it == n if exact else it.startswith(n) for n in names)]
    if found:
        return Finding(variable, Level.OK, f"{value}: {', '.join(found)}")
    text = f"{value} is no interface that is up; there are {', '.join(up)}"
    return Finding(variable, Level.FAIL, text)


def _host_name(facts: Facts, outer: list[Interface]) -> Finding:
    name, address = facts.host
    if address is None:
        text = f"{name} stands for no address; add it to /etc/hosts, or set GLOO_SOCKET_IFNAME"
        return Finding("host name", Level.NOTE, text)
    if address.startswith("127.") and outer and "GLOO_SOCKET_IFNAME" not in facts.variables:
        text = (
            f"{name} is {address}, where no other node finds it; for a job on several nodes set "
            f"GLOO_SOCKET_IFNAME={outer[0].name}"
        )
        return Finding("host name", Level.NOTE if facts.gpus else Level.OK, text)
    return Finding("host name", Level.OK, f"{name} is {address}")


# ---- the environment -----------------------------------------------------------------------------


def environment(facts: Facts) -> Iterator[Finding]:
    """Variables that change how a run works, and limits of a container.

    Args:
        facts: of the machine.
    """
    found = []
    for name, (gpu_only, problem) in VARIABLES.items():
        value = facts.variables.get(name)
        if value is None or (gpu_only and not facts.gpus):
            continue
        said = problem(value)
        found.append(Finding(name, Level.OK if said is None else Level.NOTE, said or value))
    yield from found
    if not any(it.level is Level.NOTE for it in found):
        yield Finding("environment", Level.OK, "no variable that is known to do harm")
    if facts.gpus and (facts.shared_memory or 0) < _SMALL_SHARED_GIB * _GIB:
        text = (
            f"{(facts.shared_memory or 0) >> 20} MiB in /dev/shm, through which the GPUs of a node "
            "may talk; start the container with --ipc=host or --shm-size=8g"
        )
        yield Finding("shared memory", Level.NOTE, text)


def _queues(value: str) -> str | None:
    if value == "1":
        return None
    return (
        f"{value}; Megatron-Core overlaps communication by the order of launches in one queue: "
        "unset it, runs set 1"
    )


def _allocator(value: str) -> str | None:
    if "expandable_segments:True" not in value.replace(" ", ""):
        return None
    return (
        f"{value}; expandable segments waste less memory, and are several times slower to open in "
        "another process, as weight sync to vLLM does: leave them out for rollout.engine: vllm"
    )


def _switched_on(harm: str) -> Callable[[str], str | None]:
    def problem(value: str) -> str | None:
        return None if value in ("", "0") else f"{value}; {harm}: unset it"

    return problem


def _errors_off(value: str) -> str | None:
    return (
        f"{value}; a rank that died leaves the others waiting: unset it" if value == "0" else None
    )


def _lent_packages(value: str) -> str | None:
    return f"{value}; lends packages that the table of versions knows nothing of" if value else None


VARIABLES: Final[Mapping[str, tuple[bool, Callable[[str], str | None]]]] = {
    "CUDA_DEVICE_MAX_CONNECTIONS": (True, _queues),
    "PYTORCH_ALLOC_CONF": (True, _allocator),
    "PYTORCH_CUDA_ALLOC_CONF": (True, _allocator),
    "CUDA_LAUNCH_BLOCKING": (True, _switched_on("every kernel is waited for")),
    "NCCL_P2P_DISABLE": (True, _switched_on("the GPUs of a node do not use NVLink")),
    "NCCL_IB_DISABLE": (True, _switched_on("nodes do not use InfiniBand")),
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": (True, _errors_off),
    "PYTHONPATH": (False, _lent_packages),
}
"""Variable -> (whether it matters with GPUs alone, what speaks against a value)."""
