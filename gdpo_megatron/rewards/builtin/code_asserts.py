"""Takes asserts apart: what the program computes goes inside, the comparison stays outside.

    assert abs(f(2) - 1.41) < 0.01     inside: f(2)     outside: abs(VALUE - 1.41) < 0.01

The program's part is every largest call of something that is not in `_FUNCTIONS`; the rest must be
literals, comparisons, arithmetic and these functions, and is evaluated here, by walking the tree.
Values come from the program under test, so nothing here may take long or do anything.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "bool": bool,
    "float": float,
    "frozenset": frozenset,
    "int": int,
    "len": len,
    "list": list,
    "math.isclose": math.isclose,
    "max": max,
    "min": min,
    "round": round,
    "set": set,
    "sorted": sorted,
    "str": str,
    "sum": sum,
    "tuple": tuple,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda item, container: item in container,
    ast.NotIn: lambda item, container: item not in container,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.Not: operator.not_,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
# Of numbers only: "a" * 10**12 must not be.
_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_CONTAINERS: dict[type[ast.expr], Callable[[Any], Any]] = {
    ast.List: list,
    ast.Tuple: tuple,
    ast.Set: set,
}
_MAX_BITS = 4096  # of a factor
_SLOT = "VALUE"


class _Unsplittable(Exception):
    """The assert cannot be judged outside."""


@dataclass(frozen=True, slots=True)
class SplitAssert:
    """An assert in two parts.

    Args:
        expression: evaluated inside, to a tuple of values.
        condition: of these values, as a tree with VALUE[i] in their place.
    """

    expression: str
    condition: ast.expr

    def holds(self, values: Any) -> bool:
        """Whether the condition is true of what the program gave; False where it cannot be told."""
        try:
            return bool(_evaluate(self.condition, values))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            return False
        except (RecursionError, MemoryError):
            return False


def split_asserts(source: str) -> list[SplitAssert] | None:
    """Split code that consists of asserts alone; None where a part of it must run inside.

    Raises:
        ValueError: it is no Python, or asserts nothing.
    """
    return _split_body(_parse(source).body)


def split_check(source: str, entry_point: str) -> list[SplitAssert] | None:
    """Split code that defines `check(candidate)`, as HumanEval has it; None as above.

    Raises:
        ValueError: it is no Python, or there is no such function with one argument.
    """
    checks = [
        node
        for node in _parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "check"
    ]
    if len(checks) != 1 or len(checks[0].args.args) != 1:
        raise ValueError("'check' needs one function check(candidate)")
    candidate = checks[0].args.args[0].arg

    class Rename(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            return ast.parse(entry_point, mode="eval").body if node.id == candidate else node

    return _split_body([Rename().visit(statement) for statement in checks[0].body])


def _parse(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"not Python: {error}") from error


def _split_body(statements: Sequence[ast.stmt]) -> list[SplitAssert] | None:
    splits: list[SplitAssert] = []
    for statement in statements:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # a docstring
        if not isinstance(statement, ast.Assert):
            return None
        if isinstance(statement.test, ast.Constant) and statement.test.value:
            continue  # assert True, "..."
        try:
            splits.append(_split(statement.test))
        except _Unsplittable:
            return None
    if not splits:
        raise ValueError("nothing is asserted")
    return splits


def _split(test: ast.expr) -> SplitAssert:
    calls: list[ast.expr] = []
    condition = _lift(test, calls, _FUNCTIONS)
    if not calls:  # the program's function has the name of one of these
        condition = _lift(test, calls, {})
    if not calls:
        raise _Unsplittable
    inside = ast.unparse(ast.Tuple(elts=calls, ctx=ast.Load()))
    return SplitAssert(inside, condition)


def _lift(node: ast.expr, calls: list[ast.expr], outside: Mapping[str, Any]) -> ast.expr:
    """The node with calls of the program replaced by slots; they are appended to `calls`."""
    if isinstance(node, ast.Constant):
        return node
    if isinstance(node, ast.Call) and ast.unparse(node.func) not in outside:
        calls.append(node)
        slot = ast.Constant(len(calls) - 1)
        return ast.Subscript(ast.Name(_SLOT, ast.Load()), slot, ast.Load())
    if not isinstance(node, _WALKED):
        raise _Unsplittable
    if isinstance(node, ast.BinOp) and type(node.op) not in _BINARY:
        raise _Unsplittable
    if isinstance(node, ast.UnaryOp) and type(node.op) not in _UNARY:
        raise _Unsplittable
    for name, value in ast.iter_fields(node):
        if isinstance(node, ast.Call) and name == "func":
            continue
        if isinstance(value, ast.expr):
            setattr(node, name, _lift(value, calls, outside))
        elif isinstance(value, list):
            setattr(
                node, name, [_lift_item(item, calls, outside) for item in cast("list[Any]", value)]
            )
    return node


def _lift_item(item: Any, calls: list[ast.expr], outside: Mapping[str, Any]) -> Any:
    if isinstance(item, ast.keyword):
        if item.arg is None:
            raise _Unsplittable
        item.value = _lift(item.value, calls, outside)
        return item
    if item is None:  # {**other}
        raise _Unsplittable
    return _lift(item, calls, outside) if isinstance(item, ast.expr) else item


_WALKED = (
    ast.BinOp,
    ast.BoolOp,
    ast.Call,
    ast.Compare,
    ast.Dict,
    ast.List,
    ast.Set,
    ast.Tuple,
    ast.UnaryOp,
)


def _evaluate(node: ast.expr, values: Any) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Subscript):
        return values[cast("ast.Constant", node.slice).value]
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        return _CONTAINERS[type(node)](_evaluate(item, values) for item in node.elts)
    if isinstance(node, ast.Dict):
        keys = [_evaluate(key, values) for key in node.keys if key is not None]
        return dict(zip(keys, (_evaluate(v, values) for v in node.values), strict=True))
    if isinstance(node, ast.UnaryOp):
        return _UNARY[type(node.op)](_evaluate(node.operand, values))
    if isinstance(node, ast.BinOp):
        return _arithmetic(node, _evaluate(node.left, values), _evaluate(node.right, values))
    if isinstance(node, ast.BoolOp):
        together = all if isinstance(node.op, ast.And) else any
        return together(_evaluate(item, values) for item in node.values)
    if isinstance(node, ast.Compare):
        return _compare(node, values)
    assert isinstance(node, ast.Call)
    function = _FUNCTIONS[ast.unparse(node.func)]
    keywords = {str(k.arg): _evaluate(k.value, values) for k in node.keywords}
    return function(*(_evaluate(argument, values) for argument in node.args), **keywords)


def _arithmetic(node: ast.BinOp, left: Any, right: Any) -> Any:
    for number in (left, right):
        if not isinstance(number, int | float | complex):
            raise TypeError("arithmetic outside is for numbers")
        if isinstance(number, int) and number.bit_length() > _MAX_BITS:
            raise OverflowError("too large")
    return _BINARY[type(node.op)](left, right)


def _compare(node: ast.Compare, values: Any) -> bool:
    left = _evaluate(node.left, values)
    for kind, item in zip(node.ops, node.comparators, strict=True):
        right = _evaluate(item, values)
        if not _COMPARE[type(kind)](left, right):
            return False
        left = right
    return True
