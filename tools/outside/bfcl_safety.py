"""What bfcl-eval runs of a model's own text, made safe: only the standard library.

bfcl-eval gives text that the model wrote to Python's `eval`: an argument with an operator in it
(`f(x=1 + __import__("os").system("..."))`, in every category), and each call of the multi-turn
categories. These functions take the place of `eval` in its modules. They compute what golds hold,
numbers and calls of its simulated tools with literal arguments, and refuse all else with an error,
which bfcl-eval scores as it scores text that cannot be evaluated.
"""

from __future__ import annotations

import ast
import operator
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

MAX_CHARACTERS = 10_000
MAX_POWER_BITS = 4096
_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


class Refused(Exception):
    """The text is more than such a value or call."""


def _parse(text: str) -> ast.expr:
    if len(text) > MAX_CHARACTERS:
        raise Refused(f"more than {MAX_CHARACTERS} characters")
    return ast.parse(text.strip(), mode="eval").body


def literal(text: str) -> Any:
    """The value of a literal."""
    return ast.literal_eval(_parse(text))


def arithmetic(text: str) -> Any:
    """The value of numbers joined by operators; of texts, lists and tuples joined by `+`."""
    return _compute(_parse(text))


def _compute(node: ast.expr) -> Any:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return operator.neg(_compute(node.operand))
    if not isinstance(node, ast.BinOp):
        return ast.literal_eval(node)
    left, right = _compute(node.left), _compute(node.right)
    act = _OPERATORS.get(type(node.op))
    numbers = all(isinstance(it, int | float | complex) for it in (left, right))
    joins = isinstance(node.op, ast.Add) and type(left) is type(right) in (str, list, tuple)
    if act is None or not (numbers or joins):
        raise Refused(f"{ast.unparse(node)}: neither numbers nor texts to join")
    if isinstance(node.op, ast.Pow) and isinstance(left, int) and isinstance(right, int):
        if left.bit_length() * abs(right) > MAX_POWER_BITS:
            raise Refused(f"{ast.unparse(node)}: too large")
    return act(left, right)


def tool_call(module: ModuleType) -> Callable[[str], Any]:
    """What calls `instance.method(literals)`, the instance being a variable of the module."""

    def call(text: str) -> Any:
        node = _parse(text)
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            raise Refused("no call of a tool's method")
        owner, method = node.func.value, node.func.attr
        if not isinstance(owner, ast.Name) or method.startswith("_"):
            raise Refused("no call of a tool's method")
        tool = vars(module).get(owner.id)
        # Tools are instances of classes of this one package.
        if not type(tool).__module__.startswith("bfcl_eval.eval_checker.multi_turn_eval."):
            raise Refused(f"{owner.id} is no tool")
        if any(it.arg is None for it in node.keywords):
            raise Refused("** in a call")
        positional = [ast.literal_eval(it) for it in node.args]
        named = {str(it.arg): ast.literal_eval(it.value) for it in node.keywords}
        return getattr(tool, method)(*positional, **named)

    return call


def install(package: str = "bfcl_eval") -> None:
    """Put them in the place of `eval` in all modules of the package that were imported."""
    for name, module in list(sys.modules.items()):
        if name != package and not name.startswith(f"{package}."):
            continue
        replacement: Callable[[str], Any] = literal
        if name == f"{package}.model_handler.utils":
            replacement = arithmetic
        elif name == f"{package}.eval_checker.multi_turn_eval.multi_turn_utils":
            replacement = tool_call(module)
        vars(module)["eval"] = replacement
