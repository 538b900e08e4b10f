"""What takes the place of `eval` where bfcl-eval gives a model's text to Python.

That bfcl-eval's modules are those that are named here, and that golds still score, is shown by
tests/e2e/test_outside_evaluators.py.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(REPO / "tools"))

from outside import bfcl_safety  # noqa: E402

ATTACK = "__import__('pathlib').Path('harmed').touch()"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2 * 3 + 4", 10),
        ("-2 ** 2 / 8", -0.5),
        ("7 // 2 % 2", 1),
        ("'a' + 'b'", "ab"),
        ("[1] + [2]", [1, 2]),
        ("2 ** 100", 2**100),
    ],
)
def test_arithmetic(text: str, value: object) -> None:
    assert bfcl_safety.arithmetic(text) == value


@pytest.mark.parametrize(
    "text",
    [
        f"1 + {ATTACK}",
        ATTACK,
        "().__class__ + 1",
        "9 ** 9 ** 9",
        "10 ** 100000",
        "'a' * 10 ** 9",
        "[0] * 10 ** 9",
        "1 << 10 ** 9",
        "'%s' % 1",
        "1 + x",
        f"[{ATTACK} for _ in (1,)]",
        "1 +" * 5000 + "1",
    ],
)
@pytest.mark.parametrize("name", ["arithmetic", "literal"])
def test_what_is_refused(
    text: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((bfcl_safety.Refused, ValueError)):
        getattr(bfcl_safety, name)(text)
    assert not Path("harmed").exists()


class Tool:
    __module__ = "bfcl_eval.eval_checker.multi_turn_eval.func_source_code.a_tool"
    left = 3

    def take(self, count: int, *, who: str = "") -> str:
        return f"{count} {who}"


@pytest.fixture
def package() -> types.ModuleType:
    module = types.ModuleType("tools_of_a_case")
    vars(module).update(tool=Tool(), os=sys.modules["os"])
    return module


def test_calls_of_tools(package: types.ModuleType) -> None:
    call = bfcl_safety.tool_call(package)
    assert call("tool.take(2, who='me')") == "2 me"


@pytest.mark.parametrize(
    "text",
    [
        "os.getpid()",
        "tool.__init__()",
        "tool.left",
        "tool.take.__func__(1)",
        f"tool.take({ATTACK})",
        f"tool.take(1, who={ATTACK})",
        "tool.take(**{'count': 1})",
        "tool.take(*[1])",
        "absent.take(1)",
        f"{ATTACK} or tool.take(1)",
    ],
)
def test_calls_of_anything_else(
    package: types.ModuleType, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((bfcl_safety.Refused, ValueError)):
        bfcl_safety.tool_call(package)(text)
    assert not Path("harmed").exists()


def test_each_module_gets_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "def run(text): return eval(text)"
    names = ("x", "x.model_handler.utils", "x.eval_checker.multi_turn_eval.multi_turn_utils", "xy")
    modules = []
    for name in names:
        module = types.ModuleType(name)
        exec(code, vars(module))
        monkeypatch.setitem(sys.modules, name, module)
        modules.append(module)
    vars(modules[2])["tool"] = Tool()
    bfcl_safety.install("x")
    plain, arithmetic, calls, other = modules
    assert plain.run("[{'a': 1}]") == [{"a": 1}] and arithmetic.run("1 + 1") == 2
    assert calls.run("tool.take(1)") == "1 " and other.run("len('ab')") == 2
    for module in (plain, arithmetic, calls):
        with pytest.raises((bfcl_safety.Refused, ValueError)):
            module.run("len('ab')")
