"""The tool `calculator`: exact arithmetic, bounded in time and size; nothing is ever evaluated.

An expression is parsed by `ast` and computed on fractions. It may hold whole and decimal numbers,
+ - * / // % ** and parentheses; // and % round down as in Python. The result is

    a whole number   as it is                                       84, -7
    else             rounded to `significant_digits`, half to even  0.5, 0.333333333333, 1.5e-09

with an exponent below 1e-6, and from 1e16 on. Every number on the way has at most 1,000 digits
above and below the line, an expression at most 500 characters.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from decimal import Context, Decimal, InvalidOperation
from fractions import Fraction
from typing import Any

from gdpo_megatron.environments.tools.base import TOOLS, Tool, ToolError

MAX_CHARACTERS = 500
MAX_DIGITS = 1000

_LIMIT = 10**MAX_DIGITS
_LIMIT_BITS = _LIMIT.bit_length()
_PLAIN = range(-6, 16)
"""Exponents of numbers that are written without one."""


class _Refused(Exception):
    """The expression is at fault; why."""


def calculate(expression: str, significant_digits: int = 12) -> str:
    """Return the value of an expression as a text.

    Args:
        expression: see above.
        significant_digits: of results that are no whole numbers.

    Raises:
        ToolError: it is no such expression, too large, or a division by zero.
    """
    return format_number(evaluate(expression), significant_digits)


def evaluate(expression: str) -> Fraction:
    """The exact value of an expression; raises as `calculate` does."""
    text = expression.strip()
    try:
        return _value(_parse(text), text)
    except _Refused as error:
        raise ToolError(f"Error: {error}") from None
    except ZeroDivisionError:
        raise ToolError("Error: division by zero") from None


def _parse(text: str) -> ast.expr:
    if len(text) > MAX_CHARACTERS:
        raise _Refused(f"longer than {MAX_CHARACTERS} characters")
    if not text.isascii():
        odd = next(character for character in text if not character.isascii())
        raise _Refused(f"{odd!r} is not allowed; {_WRITE}")
    try:
        return ast.parse(text, mode="eval").body
    # A null character is a ValueError; too deep a nesting one of the last two.
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else "it cannot be read"
        raise _Refused(f"not an arithmetic expression: {reason}") from None


def format_number(value: Fraction, significant_digits: int = 12) -> str:
    """A number as the tool writes it; see above."""
    if value.denominator == 1:
        return str(value.numerator)
    # MAX_DIGITS of both parts bound the exponent far inside that of a default context.
    context = Context(prec=significant_digits)
    decimal = context.divide(Decimal(value.numerator), Decimal(value.denominator))
    decimal = decimal.normalize(context)
    if decimal.adjusted() in _PLAIN:
        return format(decimal, "f")
    mantissa = decimal.scaleb(-decimal.adjusted(), context)
    return f"{mantissa:f}e{decimal.adjusted():+03d}"


def _value(node: ast.expr, text: str) -> Fraction:
    match node:
        case ast.BinOp():
            compute = _BINARY.get(type(node.op))
            if compute is None:
                raise _Refused(f"operator {type(node.op).__name__} is not allowed; {_WRITE}")
            return _bounded(compute(_value(node.left, text), _value(node.right, text)))
        case ast.UnaryOp(op=ast.UAdd()):
            return _value(node.operand, text)
        case ast.UnaryOp(op=ast.USub()):
            return -_value(node.operand, text)
        # bool is an int; the text of a float has not been rounded yet.
        case ast.Constant(value=int() as number) if number is not True and number is not False:
            return _bounded(Fraction(number))
        case ast.Constant(value=float()):
            return _decimal(ast.get_source_segment(text, node) or "")
        case ast.Constant() | ast.Name():
            raise _Refused(f"{ast.get_source_segment(text, node)} is not a number")
        case ast.Tuple():
            raise _Refused("a comma is not allowed; write 1234.5, not 1,234.5")
    raise _Refused(f"{type(node).__name__} is not allowed; {_WRITE}")


def _decimal(text: str) -> Fraction:
    try:
        number = Decimal(text)
    except InvalidOperation:  # an exponent that even Decimal cannot hold
        raise _Refused(_TOO_LARGE) from None
    if abs(number.adjusted()) > MAX_DIGITS:  # before 10 ** exponent is computed
        raise _Refused(_TOO_LARGE)
    return _bounded(Fraction(number))


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise _Refused("the exponent must be a whole number")
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if bits > 1 and (bits - 1) * abs(exponent) > _LIMIT_BITS:
        raise _Refused(_TOO_LARGE)
    if bits <= 1:  # 0, 1 and -1: only the parity matters
        exponent = exponent % 2 + 2 * (exponent > 0) - 2 * (exponent < 0)
    result = base ** int(exponent)
    assert isinstance(result, Fraction)
    return result


def _bounded(value: Fraction | int) -> Fraction:
    value = Fraction(value)
    if max(abs(value.numerator), value.denominator) >= _LIMIT:
        raise _Refused(_TOO_LARGE)
    return value


_WRITE = "write numbers, + - * / // % ** (power) and parentheses"
_TOO_LARGE = f"a number of more than {MAX_DIGITS} digits"

_BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}


@TOOLS.register("calculator")
def calculator(significant_digits: int = 12) -> Tool:
    """The tool; `significant_digits` from 1 to 50."""
    if not isinstance(significant_digits, int) or not 1 <= significant_digits <= 50:
        raise ValueError(f"significant_digits is {significant_digits!r}, not in 1 to 50")
    return Tool(
        name="calculator",
        description="Compute an arithmetic expression exactly: numbers, + - * / // % ** and ().",
        parameters={
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
            "additionalProperties": False,
        },
        function=lambda expression: calculate(expression, significant_digits),
    )
