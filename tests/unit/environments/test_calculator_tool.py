"""The calculator against Python's fractions, and inputs that would hang or flood a careless one."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdpo_megatron.environments.tools import TOOLS, ToolError, calculator
from gdpo_megatron.environments.tools.calculator import calculate, evaluate, format_number


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("12 * 34", "408"),
        (" 2 + 3 * 4 ", "14"),
        ("(2 + 3) * 4", "20"),
        ("-(3 - 5)", "2"),
        ("+7", "7"),
        ("2 ** 10", "1024"),
        ("2 ** 3 ** 2", "512"),
        ("-2 ** 2", "-4"),
        ("2 ** -2", "0.25"),
        ("4 / 2", "2"),
        ("1 / 3", "0.333333333333"),
        ("2 / 3", "0.666666666667"),
        ("-1 / 8", "-0.125"),
        # Floats would say 0.30000000000000004, 1.1102230246251565e-16 and 0.9999999999999999.
        ("0.1 + 0.2", "0.3"),
        ("0.1 + 0.2 - 0.3", "0"),
        ("1 / 49 * 49", "1"),
        # Rounded down, as Python does; not towards zero.
        ("7 // 2", "3"),
        ("-7 // 2", "-4"),
        ("-7 % 3", "2"),
        ("7.5 % 2", "1.5"),
        ("0 ** 0", "1"),
        ("1_000 * 2", "2000"),
        ("1.5e3", "1500"),
        ("10 ** 15 + 0.5", "1000000000000000"),
        ("10 ** 20 / 3", "3.33333333333e+19"),
        ("1 / 10 ** 6", "0.000001"),
        ("1 / 10 ** 7", "1e-07"),
        ("3 / 2 / 10 ** 9", "1.5e-09"),
        ("-1 / 3 / 10 ** 100", "-3.33333333333e-101"),
        ("(-1) ** 10 ** 100", "1"),
        ("(-1) ** (10 ** 100 + 1)", "-1"),
        ("123456789 * 987654321", "121932631112635269"),
    ],
)
def test_results(expression: str, result: str):
    assert calculate(expression) == result


def test_significant_digits():
    assert calculate("2 / 3", 3) == "0.667"
    assert calculate("1 / 8", 2) == "0.12"  # half to even
    assert calculate("3 / 8", 2) == "0.38"
    assert calculate("123456 + 1/2", 3) == "123000"
    assert calculate("123456", 3) == "123456"  # whole numbers are never rounded
    for wrong in (0, 51, 2.0):
        with pytest.raises(ValueError, match="significant_digits is"):
            calculator.calculator(wrong)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("1 / 0", "division by zero"),
        ("1 // (2 - 2)", "division by zero"),
        ("1 % 0", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("0 ** -(10 ** 50)", "division by zero"),
        ("", "not an arithmetic expression: invalid syntax"),
        ("2 +", "not an arithmetic expression: invalid syntax"),
        ("1; 2", "not an arithmetic expression: invalid syntax"),
        ("x = 1", "not an arithmetic expression: invalid syntax"),
        ("2 + x", "x is not a number"),
        ("'a' * 3", "'a' is not a number"),
        ("True + 1", "True is not a number"),
        ("None", "None is not a number"),
        ("2j * 2", "2j is not a number"),
        ("1,234 + 1", "a comma is not allowed"),
        ("2 ^ 3", "operator BitXor is not allowed; write numbers, + - * / // % ** (power)"),
        ("~1", "UnaryOp is not allowed"),
        ("not 1", "UnaryOp is not allowed"),
        ("1 < 2", "Compare is not allowed"),
        ("sqrt(2)", "Call is not allowed"),
        ("__import__('os').system('true')", "Call is not allowed"),
        ("(1).__class__", "Attribute is not allowed"),
        ("[1][0]", "Subscript is not allowed"),
        ("(lambda: 1)()", "Call is not allowed"),
        ("2 ** 0.5", "the exponent must be a whole number"),
        ("2 \u00d7 3", "'\u00d7' is not allowed; write numbers"),
        ("\ud800", "'\\ud800' is not allowed"),
        ("1 \0", "not an arithmetic expression: source code string cannot contain null bytes"),
    ],
)
def test_refusals(expression: str, problem: str):
    with pytest.raises(ToolError) as caught:
        calculate(expression)
    assert str(caught.value).startswith(f"Error: {problem}")


# Each of these takes a plain `eval` minutes, gigabytes or the interpreter.
_BOMBS = {
    "9 ** 9 ** 9": "digits",
    "9 ** 9 ** 9 ** 9": "digits",
    "(1/9) ** 10 ** 9": "digits",
    "2 ** -(10 ** 12)": "digits",
    "(10 ** 999) * (10 ** 999)": "digits",
    "1e999999999": "digits",
    "1e-999999999": "digits",
    "1e99999999999999999999": "digits",
    "1.5e1001": "digits",
    "*".join(["(9 ** 900)"] * 30): "digits",
    "1" * 501: "longer than 500 characters",
    "(" * 250 + "1" + ")" * 249: "not an arithmetic expression",
    "(" * 249 + "1" + ")" * 249: "not an arithmetic expression",
}


@pytest.mark.parametrize(("expression", "problem"), _BOMBS.items())
def test_bombs_are_refused(expression: str, problem: str):
    with pytest.raises(ToolError, match=problem):
        calculate(expression)


def test_the_largest_that_pass():
    assert calculate("10 ** 999") == "1" + "0" * 999
    assert calculate("-" * 499 + "1") == "-1"
    assert calculate("+".join(["1"] * 250)) == "250"
    assert calculate("9 ** 1000 // 9 ** 999") == "9"
    assert len(calculate("(1 + 1/10**9) ** 100")) <= 13


# Expressions as (text, value), or None as value where some division is by zero.
_numbers = st.one_of(
    st.integers(0, 10**6).map(lambda n: (str(n), Fraction(n))),
    st.decimals(0, 1000, places=3).map(lambda d: (format(d, "f"), Fraction(d))),
)
_OPERATIONS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b if b else None,
    "//": lambda a, b: Fraction(math.floor(a / b)) if b else None,
    "%": lambda a, b: a - b * math.floor(a / b) if b else None,
}


def _combine(parts: tuple[Any, str, Any]) -> tuple[str, Fraction | None]:
    (left, a), operator, (right, b) = parts
    value = None if a is None or b is None else _OPERATIONS[operator](a, b)
    return f"({left}) {operator} ({right})", value


_expressions = st.recursive(
    _numbers,
    lambda inner: st.tuples(inner, st.sampled_from(list(_OPERATIONS)), inner).map(_combine),
    max_leaves=8,
)


@given(_expressions)
def test_agrees_with_fractions(pair: tuple[str, Fraction | None]):
    text, value = pair
    if value is None:
        with pytest.raises(ToolError, match="division by zero"):
            evaluate(text)
    else:
        assert evaluate(text) == value
        # Whole numbers exactly, others rounded to 12 digits.
        error = 0 if value.denominator == 1 else abs(value) / 10**11
        assert abs(Fraction(calculate(text)) - value) <= error


@given(st.fractions(-1000, 1000), st.integers(-20, 20))
def test_powers_agree_with_fractions(base: Fraction, exponent: int):
    text = f"({base.numerator} / {base.denominator}) ** {exponent}"
    if base == 0 and exponent < 0:
        with pytest.raises(ToolError, match="division by zero"):
            evaluate(text)
        return
    expected = base**exponent
    if max(abs(expected.numerator), expected.denominator) < 10**900:
        assert evaluate(text) == expected


@given(st.text(alphabet="0123456789.e+-*/%()_ ", max_size=40))
def test_any_text_is_answered_or_refused(text: str):
    try:
        assert len(calculate(text)) <= 1001
    except ToolError as error:
        assert str(error).startswith("Error: ")


@given(st.fractions(max_denominator=10**30))
def test_written_numbers_read_back(value: Fraction):
    text = format_number(value, 12)
    assert len(text) <= 24 or value.denominator == 1
    assert abs(Fraction(text) - value) <= abs(value) / 10**11


def test_registered():
    tool = TOOLS.get("calculator")()
    assert tool.name == "calculator" and not tool.uses_sandbox
    assert tool.call({"expression": "6 * 7"}) == "42"
