"""Make the installed megatron.core run on a CPU, without changing torch or Megatron's files.

Megatron-Core names CUDA in hundreds of places, nearly all of them the same few forms:
`torch.cuda.current_device()`, `device="cuda"`, `.cuda()`, tensor type names. An import hook
rewrites exactly these forms (RULES) while modules of `megatron.core` are loaded, and of nothing
else: torch, other libraries and user code see the machine as it is. What is not such a form is
replaced by name (PATCHES) or stood in for (STAND_INS), each with its reason and its versions.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import logging
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import CodeType, ModuleType
from typing import Any

import torch

from gdpo_megatron.platform import null_cuda, null_triton
from gdpo_megatron.platform.megatron_versions import Version, megatron_version

_PACKAGE = "megatron.core"
_NULL = "_gdpo_null_cuda"  # the name of null_cuda inside rewritten modules
_TYPE_NAMES = {
    f"torch.cuda.{kind}Tensor": f"torch.{kind}Tensor" for kind in ("Float", "Half", "BFloat16")
}

RULES: dict[str, str] = {
    "namespace": "torch.cuda.<name> -> null_cuda.<name>: current device, streams, RNG, memory",
    "device literal": 'device="cuda" and .to("cuda") -> "cpu": buffers of DDP, optimizer, p2p',
    "cuda call": "tensor.cuda() -> tensor",
    "pinned memory": "pin_memory=True -> False: needs an accelerator to exist",
    "type name": '"torch.cuda.FloatTensor" -> "torch.FloatTensor": asserts of the optimizers',
}
rewritten_sites: Counter[str] = Counter()
"""How often each rule was applied in this process; the canary test compares it."""


def _is_cuda_literal(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value.split(":")[0] == "cuda"
    )


def _is_pinned(keyword: ast.keyword) -> bool:
    value = keyword.value
    return keyword.arg == "pin_memory" and isinstance(value, ast.Constant) and value.value is True


class _Rewriter(ast.NodeTransformer):
    def __init__(self, stand_in: StandIn | None = None) -> None:
        self.sites: Counter[str] = Counter()
        self._stand_in = stand_in

    def visit_Import(self, node: ast.Import) -> ast.AST:
        if self._stand_in is None:
            return node
        top = self._stand_in.package
        if not all(it.name == top or it.name.startswith(f"{top}.") for it in node.names):
            return node
        package, _, module = self._stand_in.replacement.rpartition(".")
        names = [ast.alias(module, it.asname or top) for it in node.names]
        return ast.copy_location(ast.ImportFrom(package, names, 0), node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.value, ast.Name) and (node.value.id, node.attr) == ("torch", "cuda"):
            self.sites["namespace"] += 1
            return ast.copy_location(ast.Name(_NULL, ast.Load()), node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        function = node.func
        if isinstance(function, ast.Attribute) and function.attr == "cuda":
            self.sites["cuda call"] += 1
            node.func = ast.Attribute(ast.Name(_NULL, ast.Load()), "identity", ast.Load())
            node.args.insert(0, function.value)
        elif isinstance(function, ast.Attribute) and function.attr in ("to", "device"):
            if node.args and _is_cuda_literal(node.args[0]):
                self.sites["device literal"] += 1
                node.args[0] = ast.Constant("cpu")
        for keyword in node.keywords:
            if _is_pinned(keyword):
                self.sites["pinned memory"] += 1
                keyword.value = ast.copy_location(ast.Constant(False), keyword.value)
            if keyword.arg in ("device", "device_type") and _is_cuda_literal(keyword.value):
                self.sites["device literal"] += 1
                keyword.value = ast.Constant("cpu")
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str) and node.value in _TYPE_NAMES:
            self.sites["type name"] += 1
            return ast.copy_location(ast.Constant(_TYPE_NAMES[node.value]), node)
        return node


def rewrite(
    source: str, path: str, stand_in: StandIn | None = None
) -> tuple[ast.Module, Counter[str]]:
    """Parse `source` and apply RULES; returns the tree and the number of sites by rule.

    Args:
        source: of a module.
        path: of its file, for tracebacks.
        stand_in: for a package that the module imports.
    """
    tree = ast.parse(source, path)
    rewriter = _Rewriter(stand_in)
    tree = rewriter.visit(tree)
    if rewriter.sites:
        # After the docstring and the __future__ imports, which must stay first.
        position = next(
            i
            for i, node in enumerate(tree.body)
            if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
            and not (isinstance(node, ast.ImportFrom) and node.module == "__future__")
        )
        package, _, module = null_cuda.__name__.rpartition(".")
        tree.body.insert(position, ast.ImportFrom(package, [ast.alias(module, _NULL)], 0))
    return ast.fix_missing_locations(tree), rewriter.sites


class _Loader(importlib.machinery.SourceFileLoader):
    def path_stats(self, path: str) -> dict[str, Any]:
        raise OSError("rewritten code must not meet the byte-code cache of the original")

    def source_to_code(self, data: bytes, path: str, *, _optimize: int = -1) -> CodeType:
        stand_ins = (it for it in STAND_INS if it.module == self.name and it.is_needed())
        tree, sites = rewrite(data.decode(), path, next(stand_ins, None))
        rewritten_sites.update(sites)
        return compile(tree, path, "exec", dont_inherit=True, optimize=_optimize)

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        for patch in PATCHES:
            if patch.module == module.__name__ and patch.is_needed():
                patch.apply(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _PACKAGE and not fullname.startswith(_PACKAGE + "."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


_FOREVER: Version = (1000, 0, 0)


@dataclass(frozen=True, kw_only=True)
class _ForVersions:
    """Something that Megatron needs from version `first` on, to the one before `before`."""

    module: str
    reason: str
    first: Version = (0, 0, 0)
    before: Version = _FOREVER

    def is_needed(self) -> bool:
        """Whether the installed version needs it."""
        return self.first <= megatron_version() < self.before


@dataclass(frozen=True, kw_only=True)
class Patch(_ForVersions):
    """One replacement by name, applied when `module` has been executed."""

    apply: Callable[[ModuleType], None]


@dataclass(frozen=True, kw_only=True)
class StandIn(_ForVersions):
    """What `module`, and no other, gets when it imports `package`."""

    package: str
    replacement: str


def _disable_jit(module: Any) -> None:
    module.disable_jit_fuser()


def _use_cpu_rng(module: Any) -> None:
    module._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    module._set_cuda_rng_state = lambda new_state, *args, **kwargs: torch.set_rng_state(new_state)
    # The tracker warns whenever a fork changes the CPU state, which is its job here.
    logging.getLogger(module.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def _no_general_gemm(module: Any) -> None:
    module.te_general_gemm = None


def _splits_as_numpy(module: Any) -> None:
    module.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
    )


PATCHES: tuple[Patch, ...] = (
    Patch(
        module="megatron.core.jit",
        reason="jit_fuser is torch.compile: about 10 s at the first call, nothing to fuse here",
        apply=_disable_jit,
    ),
    Patch(
        module="megatron.core.tensor_parallel.random",
        reason="the RNG tracker reads and sets the state of a CUDA generator",
        apply=_use_cpu_rng,
    ),
    Patch(
        module="megatron.core.transformer.moe.moe_utils",
        reason="without Transformer Engine the router asks for a name that was never defined",
        before=(0, 19, 0),  # there it is defined as None
        apply=_no_general_gemm,
    ),
    Patch(
        module="megatron.core.transformer.moe.token_dispatcher",
        reason="split sizes become numbers only on their way from a GPU; all_to_all wants numbers",
        apply=_splits_as_numpy,
    ),
)

STAND_INS: tuple[StandIn, ...] = (
    StandIn(
        module="megatron.core.transformer.moe.ops.paged_stash",
        reason="it defines kernels for stashing activations, and every GPTModel imports it",
        first=(0, 19, 0),
        package="triton",
        replacement=null_triton.__name__,
    ),
)


def install() -> None:
    """Install the hook; a second call does nothing.

    Raises:
        InputError: no megatron.core, or a version that is not supported.
        RuntimeError: megatron.core was imported before, and so holds the original code.
    """
    megatron_version()
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    loaded = [name for name in sys.modules if name == _PACKAGE or name.startswith(_PACKAGE + ".")]
    if loaded:
        raise RuntimeError(
            f"{loaded[0]} was imported before gdpo_megatron prepared it for the CPU; "
            "call detect_platform().prepare_megatron() first"
        )
    sys.meta_path.insert(0, _Finder())
