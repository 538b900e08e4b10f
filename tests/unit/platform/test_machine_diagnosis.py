"""What `doctor` says of machines: this one, and made-up ones.

No test here has seen a GPU. Those rows are judged from facts that are written by hand, so that what
is said of them is known; that the facts would be gathered so on a machine with GPUs is not shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest

from gdpo_megatron.platform import diagnosis
from gdpo_megatron.platform.findings import Finding
from gdpo_megatron.platform.machine import Facts, Gpu, Interface, driver_version, gather

GIB = 1 << 30
HOPPER = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 79 * GIB)
GPU_NODE = Facts(
    python="3.12",
    torch="2.13.0+cu130",
    toolkit="13.0",
    gpus=(HOPPER,) * 8,
    devices=8,
    driver="580.95.05",
    nccl=(2, 29, 7),
    packages={
        "transformers": "5.19.0",
        "transformer-engine": "2.20.2",
        "transformer-engine-torch": "2.20.2",
    },
    interfaces=(Interface("eth0", "10.0.0.5", 25000), Interface("docker0", "172.17.0.1", 0)),
    host=("node-0", "10.0.0.5"),
    adapters={"mlx5_0:1": True},
    shared_memory=64 * GIB,
)
LAPTOP = Facts(
    packages={"transformers": "5.19.0"}, interfaces=(Interface("wlan0", "192.0.2.7", 0),)
)

Diagnose = Callable[[Facts], Iterable[Finding]]


def lines(diagnose: Diagnose, facts: Facts) -> list[str]:
    return [f"{it.level} {it.what}: {it.text}" for it in diagnose(facts)]


def test_a_node_with_nothing_wrong():
    assert lines(diagnosis.versions, GPU_NODE) == [
        "ok version table: row gpu: torch is a build for CUDA 13.0",
        "ok torch: 2.13.0+cu130",
        "ok transformers: 5.19.0",
        "ok transformer-engine: 2.20.2",
        "ok transformer-engine-torch: 2.20.2",
    ]
    assert lines(diagnosis.hardware, GPU_NODE) == [
        "ok GPU driver: 580.95.05",
        "ok GPUs: 8 x NVIDIA H100 80GB HBM3, 79 GiB, compute capability 9.0",
        "ok NCCL: 2.29.7",
    ]
    assert lines(diagnosis.precision, GPU_NODE) == [
        "ok FP8: precision.fp8 can be set: torch's own product runs",
        "ok layers: Transformer Engine 2.20.2",
    ]
    assert lines(diagnosis.network, GPU_NODE) == [
        "ok interface eth0: 10.0.0.5, 25000 Mb/s",
        "ok host name: node-0 is 10.0.0.5",
        "ok InfiniBand: 1 of 1 ports active: mlx5_0:1",
    ]
    assert lines(diagnosis.environment, GPU_NODE) == [
        "ok environment: no variable that is known to do harm"
    ]


def test_a_laptop_hears_nothing_of_gpus():
    for diagnose in (
        diagnosis.versions,
        diagnosis.hardware,
        diagnosis.precision,
        diagnosis.network,
        diagnosis.environment,
    ):
        found = lines(diagnose, LAPTOP)
        assert found and not [it for it in found if not it.startswith("ok ")]
        assert not any("NCCL" in it or "InfiniBand" in it for it in found)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"torch": "2.12.0+cu130"}, "FAIL torch: 2.12.0+cu130, but the row has torch==2.13.0; "),
        ({"packages": {}}, "FAIL transformers: not installed; the row has transformers>=5.16.1"),
        ({"packages": {}}, "note transformer-engine: not installed; layers are Megatron-Core's"),
        (
            {"packages": {"transformer-engine": "2.18.0"}},
            "FAIL transformer-engine: 2.18.0, but the row has transformer-engine==2.20.*; ",
        ),
        ({"apex": "other"}, "FAIL apex: a package of that name that is not NVIDIA's: pip uninst"),
        ({"apex": "nvidia"}, "ok apex: NVIDIA's; not needed"),
    ],
)
def test_versions(change: dict[str, object], said: str):
    found = lines(diagnosis.versions, replace(GPU_NODE, **change))
    assert any(it.startswith(said) for it in found), found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"toolkit": None}, "note GPUs: 8 here, but torch is a CPU build, so runs use the CPU; "),
        ({"driver": None, "gpus": (), "devices": 0}, "FAIL GPU driver: none is loaded; install 5"),
        ({"driver": "570.86.10", "gpus": ()}, "FAIL GPU driver: 570.86.10; a build of torch for "),
        # with the image's compatibility package
        ({"driver": "570.86.10"}, "note GPU driver: 570.86.10; a build of torch for CUDA 13.0 n"),
        ({"gpus": ()}, "FAIL GPUs: torch sees none (8 in /dev): runs would use the CPU; see the"),
        (
            {"gpus": (), "variables": {"CUDA_VISIBLE_DEVICES": ""}},
            "note GPUs: hidden by CUDA_VISIBLE_DEVICES='', so runs use the CPU; unset it",
        ),
        (
            {"gpus": (HOPPER, Gpu("NVIDIA A100", (8, 0), 39 * GIB))},
            "note GPUs: 1 x NVIDIA A100, 39 GiB, compute capability 8.0; 1 x NVIDIA H100 80GB HBM3,"
            " 79 GiB, compute capability 9.0: not all alike",
        ),
        ({"nccl": (2, 28, 3)}, "note NCCL: 2.28.3; 2.28.3 to 2.28.8 are to be avoided"),
        ({"nccl": (2, 28, 8)}, "note NCCL: 2.28.8; "),
        ({"nccl": (2, 28, 9)}, "ok NCCL: 2.28.9"),
    ],
)
def test_hardware(change: dict[str, object], said: str):
    found = lines(diagnosis.hardware, replace(GPU_NODE, **change))
    assert any(it.startswith(said) for it in found), found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"gpus": (Gpu("Tesla T4", (7, 5), 15 * GIB),)},
            "note bfloat16: Tesla T4 computes it in f",
        ),
        (
            {"missing_for_fp8": "a GPU of X"},
            "note FP8: precision.fp8 needs a GPU of X; leave it nu",
        ),
        (
            {"packages": {}},
            "note layers: Megatron-Core's own: Transformer Engine is not installed; ",
        ),
        (
            {"transformer_engine_problem": "no shared object"},
            "FAIL layers: installed, but importing it fails (no shared object), and with it Megatr",
        ),
    ],
)
def test_precision(change: dict[str, object], said: str):
    found = lines(diagnosis.precision, replace(GPU_NODE, **change))
    assert any(it.startswith(said) for it in found), found


TWO = (Interface("eth0", "10.0.0.5", 0), Interface("eth1", "10.1.0.5", 0))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"interfaces": ()},
            "note interfaces: none leads to other machines: jobs on one node only",
        ),
        (
            {"interfaces": TWO},
            "note interfaces: eth0 and eth1: for a job on several nodes set GLOO_SOCKET_IFNAME and "
            "NCCL_SOCKET_IFNAME to the one that they share",
        ),
        (
            {"interfaces": TWO, "variables": {"NCCL_SOCKET_IFNAME": "eth"}},
            "note interfaces: eth0 and eth1: for a job on several nodes set GLOO_SOCKET_IFNAME to ",
        ),
        ({"variables": {"NCCL_SOCKET_IFNAME": "eth"}}, "ok NCCL_SOCKET_IFNAME: eth: eth0"),
        ({"variables": {"NCCL_SOCKET_IFNAME": "=eth"}}, "FAIL NCCL_SOCKET_IFNAME: =eth is no inte"),
        ({"variables": {"NCCL_SOCKET_IFNAME": "^docker"}}, "ok NCCL_SOCKET_IFNAME: ^docker: all "),
        # gloo takes whole names
        (
            {"variables": {"GLOO_SOCKET_IFNAME": "eth"}},
            "FAIL GLOO_SOCKET_IFNAME: eth is no interface that is up; there are eth0, docker0, lo",
        ),
        ({"host": ("node-0", None)}, "note host name: node-0 stands for no address; add it to /e"),
        (
            {"host": ("node-0", "127.0.1.1")},
            "note host name: node-0 is 127.0.1.1, where no other node finds it; for a job on "
            "several nodes set GLOO_SOCKET_IFNAME=eth0",
        ),
        ({"adapters": {}}, "note InfiniBand: none: between nodes NCCL uses TCP"),
        (
            {"adapters": {"a:1": True, "b:1": False}},
            "note InfiniBand: 1 of 2 ports active: a:1, b:1",
        ),
        (
            {"locked_memory": 65536},
            "note locked memory: 64 KiB may be locked; RDMA needs ulimit -l",
        ),
    ],
)
def test_network(change: dict[str, object], said: str):
    found = lines(diagnosis.network, replace(GPU_NODE, **change))
    assert any(it.startswith(said) for it in found), found


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("CUDA_DEVICE_MAX_CONNECTIONS", "1", "8"),
        ("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512", "a:1, expandable_segments:True"),
        ("PYTORCH_ALLOC_CONF", "expandable_segments:False", "expandable_segments:True"),
        ("CUDA_LAUNCH_BLOCKING", "0", "1"),
        ("NCCL_P2P_DISABLE", "0", "1"),
        ("NCCL_IB_DISABLE", "0", "1"),
        ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1", "0"),
        ("PYTHONPATH", "", "/opt/other"),
    ],
)
def test_variables(name: str, good: str, bad: str):
    """Each of the table, and only where it matters."""
    assert name in diagnosis.VARIABLES

    def said(facts: Facts, value: str) -> list[str]:
        return lines(diagnosis.environment, replace(facts, variables={name: value}))

    assert said(GPU_NODE, good)[0] == f"ok {name}: {good}"
    assert said(GPU_NODE, bad)[0].startswith(f"note {name}: {bad}; ")
    assert len(said(GPU_NODE, bad)) == 1
    assert any(it.startswith("note") for it in said(LAPTOP, bad)) == (name == "PYTHONPATH")


def test_all_variables_are_tested():
    marked = test_variables.pytestmark[0].args[1]
    assert {it[0] for it in marked} == set(diagnosis.VARIABLES)


def test_small_shared_memory():
    small = replace(GPU_NODE, shared_memory=64 << 20)
    assert lines(diagnosis.environment, small)[-1].startswith("note shared memory: 64 MiB in /dev/")
    assert len(lines(diagnosis.environment, replace(LAPTOP, shared_memory=64 << 20))) == 1


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22\n", "550.54.14"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n",
            "580.95.05",
        ),
        ("", None),
    ],
)
def test_driver_version(text: str, version: str | None):
    assert driver_version(text) == version


def test_this_machine():
    """What is gathered can be judged; of what is there, only what any machine of CI has."""
    facts = gather()
    assert facts.packages["transformers"] and facts.torch.startswith("2.13.0")
    assert facts.variables.get("PATH") and facts.host[0]
    for diagnose in (diagnosis.versions, diagnosis.hardware, diagnosis.network):
        assert list(diagnose(facts))
