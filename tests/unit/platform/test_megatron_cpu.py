"""The CPU layer: what it rewrites and what it leaves, and that every part of it is still needed.

The canaries train one step on the installed Megatron with one part taken away, each in a process
of its own (megatron_probe.py). One that no longer fails means that the part can go. Left out: what
only pipelines or several ranks reach; tests/distributed trains there.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import py_compile
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from gdpo_megatron.platform import megatron_cpu, null_cuda

HERE = Path(__file__).parent
RULE_CASES = [f"rule:{name}" for name in megatron_cpu.RULES]
# What the installed version needs; test_every_patch_has_a_canary has the rest.
PATCH_CASES = [f"patch:{patch.module}" for patch in megatron_cpu.PATCHES if patch.is_needed()]
STAND_IN_CASES = [f"stand-in:{it.module}" for it in megatron_cpu.STAND_INS if it.is_needed()]
OLD = "0.16.1"  # some patches are for it alone
NO_DRIVER = "RuntimeError: Found no NVIDIA driver"  # a build of torch for GPUs, without one

# Sites in the modules that a training process loads. Another version: look at what changed there
# (new forms of the same requests show up as failures of the runs below), then add its numbers.
SITES = {
    "0.16.1": {
        "namespace": 309,
        "device literal": 62,
        "cuda call": 9,
        "pinned memory": 6,
        "type name": 9,
    },
    "0.19.2": {
        "namespace": 422,
        "device literal": 73,
        "cuda call": 10,
        "pinned memory": 15,
        "type name": 9,
    },
}


# ---- rewriting -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "rewritten", "rule"),
    [
        ("torch.cuda.current_device()", "_gdpo_null_cuda.current_device()", "namespace"),
        ("torch.cuda.nvtx.range_pop()", "_gdpo_null_cuda.nvtx.range_pop()", "namespace"),
        ("isinstance(x, torch.cuda.Event)", "isinstance(x, _gdpo_null_cuda.Event)", "namespace"),
        ("torch.zeros(2, device='cuda')", "torch.zeros(2, device='cpu')", "device literal"),
        ("f(device_type='cuda')", "f(device_type='cpu')", "device literal"),
        ("torch.device('cuda:0')", "torch.device('cpu')", "device literal"),
        ("x.to('cuda', dtype)", "x.to('cpu', dtype)", "device literal"),
        ("x.cuda()", "_gdpo_null_cuda.identity(x)", "cuda call"),
        ("f(x).cuda(0, a=1)", "_gdpo_null_cuda.identity(f(x), 0, a=1)", "cuda call"),
        ("torch.empty(2, pin_memory=True)", "torch.empty(2, pin_memory=False)", "pinned memory"),
        ("x == 'torch.cuda.HalfTensor'", "x == 'torch.HalfTensor'", "type name"),
    ],
)
def test_rewritten(source: str, rewritten: str, rule: str) -> None:
    tree, sites = megatron_cpu.rewrite(source, "snippet.py")
    assert ast.unparse(tree.body[-1]) == rewritten
    assert dict(sites) == {rule: 1}


@pytest.mark.parametrize(
    "source",
    [
        "x.device.type == 'cuda'",
        "self.cuda_graph(x)",
        "torch.cudart()",
        "own.cuda.current_device()",
        "raise E('needs torch.cuda.FloatTensor or so')",
        "{'cuda': 1}",
        "f(kind='cuda')",
        "x.to(device, 'cuda')",
        "torch.empty(2, pin_memory=pinned)",
        "'torch.cuda'",
    ],
)
def test_left_alone(source: str) -> None:
    tree, sites = megatron_cpu.rewrite(source, "snippet.py")
    assert ast.unparse(tree) == ast.unparse(ast.parse(source)) and not sites


def test_rewritten_code_runs_and_keeps_its_lines() -> None:
    source = (
        '"""Doc."""\n'
        "from __future__ import annotations\n"
        "import torch\n"
        "made = torch.ones(3, device='cuda').cuda(torch.cuda.current_device())\n"
        "kind = 'torch.cuda.FloatTensor'\n"
        "torch.cuda.no_such_function()\n"
    )
    tree, sites = megatron_cpu.rewrite(source, "snippet.py")
    assert sum(sites.values()) == 5
    assert ast.get_docstring(tree) == "Doc."
    names: dict[str, Any] = {}
    with pytest.raises(AttributeError, match=r"asks for torch\.cuda\.no_such_function") as caught:
        exec(compile(tree, "snippet.py", "exec"), names)
    assert caught.traceback[-2].lineno == 5, "the sixth line, counted from 0"
    assert names["made"].device.type == "cpu" and names["made"].tolist() == [1, 1, 1]
    assert names["kind"] == names["made"].type()
    assert names["torch"] is torch


def test_byte_code_of_the_original_is_neither_used_nor_replaced(tmp_path: Path) -> None:
    path = tmp_path / "fake.py"
    path.write_text("import torch\ndevice = torch.cuda.current_device()\n")
    cached = Path(py_compile.compile(str(path), doraise=True))
    original = cached.read_bytes()
    loader = megatron_cpu._Loader("megatron.core.fake", str(path))
    spec = importlib.util.spec_from_loader("megatron.core.fake", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    assert module.device == torch.device("cpu")
    assert cached.read_bytes() == original


@pytest.mark.parametrize("name", ["torch.cuda", "megatron", "megatron.coretools", "numpy"])
def test_other_packages_are_not_touched(name: str) -> None:
    assert megatron_cpu._Finder().find_spec(name, None) is None


# ---- stand-ins -----------------------------------------------------------------------------------

NO_TRITON = megatron_cpu.StandIn(
    module="megatron.core.fake",
    reason="it imports it without asking",
    package="triton",
    replacement="gdpo_megatron.platform.null_triton",
)


def test_kernels_can_be_defined_and_not_started() -> None:
    source = (
        "import numpy as np, os\n"
        "import triton\n"
        "import triton.language as tl\n"
        "@triton.jit\n"
        "def kernel(x, SIZE: tl.constexpr): ...\n"
    )
    tree, sites = megatron_cpu.rewrite(source, "snippet.py", NO_TRITON)
    names: dict[str, Any] = {}
    exec(compile(tree, "snippet.py", "exec"), names)
    assert not sites and names["np"].ones(1) == 1.0 and names["os"] is os
    with pytest.raises(RuntimeError, match="starts the triton kernel kernel, which needs a GPU"):
        names["kernel"][(1,)]
    assert "triton" not in sys.modules or importlib.util.find_spec("triton")


def test_other_modules_find_what_is_installed() -> None:
    tree, _ = megatron_cpu.rewrite("import triton\nimport tritons", "snippet.py")
    assert ast.unparse(tree) == "import triton\nimport tritons"
    tree, _ = megatron_cpu.rewrite("import tritons", "snippet.py", NO_TRITON)
    assert ast.unparse(tree) == "import tritons"


# ---- the null namespace --------------------------------------------------------------------------


def test_unknown_functions_raise() -> None:
    for name in ("memory_allocated", "graph_pool_handle", "_lazy_init", "random"):
        message = rf"torch\.cuda\.{name}, which gdpo_megatron does not redirect.*null_cuda\.py"
        with pytest.raises(AttributeError, match=message):
            getattr(null_cuda, name)
    assert not hasattr(null_cuda, "memory_allocated")


def test_types_are_those_of_torch() -> None:
    """They are named in annotations and isinstance tests, which hold for no CPU tensor."""
    assert null_cuda.FloatTensor is torch.cuda.FloatTensor
    assert not isinstance(torch.ones(1), null_cuda.FloatTensor)


def test_what_it_answers() -> None:
    assert null_cuda.current_device() == torch.device("cpu")
    assert not null_cuda.is_available()
    tensor = torch.ones(2)
    assert null_cuda.identity(tensor, 3, non_blocking=True) is tensor
    with null_cuda.stream(null_cuda.Stream(priority=1)) as entered:
        assert entered is None
    event = null_cuda.current_stream().record_event()
    assert event.query()
    state = null_cuda.get_rng_state("cuda")
    null_cuda.manual_seed(3)
    first = torch.rand(2)
    null_cuda.manual_seed(3)
    assert torch.equal(first, torch.rand(2))
    null_cuda.set_rng_state(state)
    assert torch.equal(torch.get_rng_state(), state)


# ---- canaries on the installed Megatron ----------------------------------------------------------


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What happened in each case; see megatron_probe.py."""
    folder = tmp_path_factory.mktemp("probe")
    config = {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 16,
        "max_position_embeddings": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    command = [sys.executable, str(HERE / "megatron_probe.py"), str(folder)]
    done = subprocess.run(
        [*command, "all", "hook", *RULE_CASES, *PATCH_CASES, *STAND_IN_CASES],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_trains(probe: dict[str, dict[str, Any]]) -> None:
    """With all of it a step works, in a torch that is as it was."""
    report = probe["all"]
    assert "error" not in report, report
    # 16 tokens and small new weights: nearly uniform.
    assert report["stats"]["loss"] == pytest.approx(2.77, abs=0.05)
    assert report["stats"]["grad_norm"] > 0
    assert report["torch_untouched"] and report["num_hooks"] == 1
    assert "install_again" not in report


def test_number_of_sites(probe: dict[str, dict[str, Any]]) -> None:
    installed = version("megatron-core")
    assert installed in SITES, f"megatron-core {installed} is new here; see SITES"
    assert probe["all"]["sites"] == SITES[installed]
    assert SITES[installed].keys() == megatron_cpu.RULES.keys()


def test_without_the_hook(probe: dict[str, dict[str, Any]]) -> None:
    """Megatron asks for CUDA; once it is imported like that, the hook refuses to come later."""
    expected = ("AssertionError: Torch not compiled with CUDA enabled", NO_DRIVER)
    if STAND_IN_CASES and importlib.util.find_spec("triton") is None:  # it does not get that far
        expected = ("ModuleNotFoundError: No module named 'triton'",)
    assert probe["hook"]["error"].startswith(expected)
    assert probe["hook"]["sites"] == {}
    message = r"megatron\.core[.\w]* was imported before gdpo_megatron prepared it for the CPU"
    assert re.match(message, probe["hook"]["install_again"])


@pytest.mark.parametrize("case", RULE_CASES)
def test_rule_is_needed(case: str, probe: dict[str, dict[str, Any]]) -> None:
    """Without it, a step, what a checkpoint collects, or context parallelism fails on CUDA."""
    rule = case.removeprefix("rule:")
    expected = dict(probe["all"]["sites"])
    del expected[rule]
    sites = probe[case]["sites"]
    if rule == "namespace":  # by 0.19 the import itself breaks off, before all modules are loaded
        assert sites.keys() == expected.keys()
        assert all(sites[it] <= expected[it] for it in expected)
    else:
        assert sites == expected
    assert probe["all"]["rotary_positions"] == [2.0, 3.0, 4.0, 5.0]
    if rule == "pinned memory":
        assert "error" not in probe[case], "a step without context parallelism needs none"
        expected = ("RuntimeError: pin_memory=True requires", NO_DRIVER)
        assert probe[case]["rotary_positions"].startswith(expected)
        return
    words = ("CUDA", NO_DRIVER)
    if rule == "type name":
        words = ("Wrapped parameters must be one of torch.cuda",)
    assert any(it in probe[case]["error"] for it in words)


def test_jit_patch_is_needed(probe: dict[str, dict[str, Any]]) -> None:
    assert probe["all"]["jit_fuser"] == "megatron.core.jit.noop_decorator"
    assert probe["patch:megatron.core.jit"]["jit_fuser"] == "torch.compile"


def test_rng_patch_is_needed(probe: dict[str, dict[str, Any]]) -> None:
    """Megatron's tracker draws from its own stream and gives the caller's back."""
    assert probe["all"]["fork"] == {"left_alone": True, "own_stream": True}
    assert "torch.cuda.random" in probe["patch:megatron.core.tensor_parallel.random"]["fork"]


def test_router_patch_is_needed(probe: dict[str, dict[str, Any]]) -> None:
    """By 0.16; later versions are not patched, and route."""
    assert probe["all"]["router_logits"] == [[1.0, 0.0], [2.0, 3.0]]
    without = probe.get("patch:megatron.core.transformer.moe.moe_utils")
    assert (without is not None) == (version("megatron-core") == OLD)
    if without is not None:
        error = without["router_logits"]
        assert error == "NameError: name 'te_general_gemm' is not defined"


def test_dispatcher_patch_is_needed(probe: dict[str, dict[str, Any]]) -> None:
    """all_to_all_single takes numbers; on a GPU they become numbers on their way to the host."""
    assert probe["all"]["splits"] == "ndarray"
    assert probe["patch:megatron.core.transformer.moe.token_dispatcher"]["splits"] == "Tensor"


@pytest.mark.skipif(not STAND_IN_CASES, reason="this Megatron imports triton nowhere unasked")
@pytest.mark.skipif(importlib.util.find_spec("triton") is not None, reason="triton is installed")
def test_stand_in_is_needed(probe: dict[str, dict[str, Any]]) -> None:
    """And it is seen by that one module: to the others there is no triton."""
    [case] = STAND_IN_CASES
    assert probe[case]["error"] == "ModuleNotFoundError: No module named 'triton'"
    assert Path(probe[case]["where"].rpartition(":")[0]).match("moe/ops/paged_stash.py")


def test_every_patch_has_a_canary() -> None:
    old = version("megatron-core") == OLD
    assert [*PATCH_CASES, *STAND_IN_CASES] == [
        "patch:megatron.core.jit",
        "patch:megatron.core.tensor_parallel.random",
        *(["patch:megatron.core.transformer.moe.moe_utils"] if old else []),
        "patch:megatron.core.transformer.moe.token_dispatcher",
        *([] if old else ["stand-in:megatron.core.transformer.moe.ops.paged_stash"]),
    ]


def test_null_namespace_holds_nothing_that_is_not_asked_for(
    probe: dict[str, dict[str, Any]],
) -> None:
    asked: set[str] = set()
    for file in probe["all"]["files"]:
        for node in ast.walk(ast.parse(Path(file).read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.cuda":
                asked.add(node.attr)
    own = {
        name
        for name, value in vars(null_cuda).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == null_cuda.__name__
    }
    assert {"current_device", "Stream", "nvtx"} <= own
    assert own - asked == {"identity"}
