"""The environment `tools`: which calls a turn has, what the model reads of each, what is counted.

The Python tool meets a fake sandbox here; real programs are run in tests/security.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gdpo_megatron.environments.base import EnvironmentStep, Task
from gdpo_megatron.environments.resolve import environment_factory
from gdpo_megatron.environments.tools import (
    REWARD_NAMES,
    Tool,
    ToolsEnvironment,
    find_tools,
    python,
    tool_schemas,
)
from gdpo_megatron.environments.tools.base import ArgumentsError
from gdpo_megatron.environments.tools.calls import BadCall, Call, read_calls
from gdpo_megatron.errors import InputError
from gdpo_megatron.sandbox import Execution, Status, is_sandbox_user


def block(*calls: Any) -> str:
    """A block of calls, as ToolRL writes them; texts as they are."""
    lines = [it if isinstance(it, str) else json.dumps(it) for it in calls]
    return "<tool_call>\n" + "\n".join(lines) + "\n</tool_call>"


def calc(expression: Any, key: str = "arguments") -> dict[str, Any]:
    return {"name": "calculator", key: {"expression": expression}}


def step(turn: str, **args: Any) -> EnvironmentStep:
    environment = ToolsEnvironment(**{"tools": ["calculator"], **args})
    environment.reset(Task(prompt="p"))
    return environment.step(turn)


def counts(
    calls: int = 0, call_errors: int = 0, tool_errors: int = 0, used_tool: int = 0
) -> Mapping[str, float]:
    return dict(zip(REWARD_NAMES, (calls, call_errors, tool_errors, used_tool), strict=True))


# ---- which calls ---------------------------------------------------------------------------------

ONE, TWO = Call("f", {"x": 1}), Call("g", {})
F = '{"name": "f", "arguments": {"x": 1}}'
G = '{"name": "g"}'


@pytest.mark.parametrize(
    ("turn", "calls"),
    [
        ("The answer is 3.", []),
        ("", []),
        ("a stray </tool_call>", []),
        ("<tool_calls>\n{}\n</tool_calls>", []),
        (block(F), [ONE]),
        ("Let me see.\n" + block(F) + "\nThen", [ONE]),
        (f"<tool_call>{F}</tool_call>", [ONE]),
        (block(F.replace("arguments", "parameters")), [ONE]),
        (block('{\n  "name": "f",\n  "arguments": {"x": 1.0}\n}'), [ONE]),  # over several lines
        (block(F, G), [ONE, TWO]),  # ToolRL: one a line
        (block(F, "", G), [ONE, TWO]),
        (block(F).replace("\n", "\r\n"), [ONE]),
        (block(F) + "\n" + block(G), [ONE, TWO]),  # Hermes: one a block
        (block(G) + block(F, F), [TWO, ONE, ONE]),
        # Of the thinking text nothing counts, as long as it ends.
        (f"<think>maybe {block(G)}?</think>\n{block(F)}", [ONE]),
        (f"<think>maybe {block(G)}</think>no", []),
    ],
)
def test_calls_that_can_be_read(turn: str, calls: list[Call]):
    assert read_calls(turn, "tool_call") == calls


@pytest.mark.parametrize(
    ("turn", "problems"),
    [
        ("<tool_call>\n" + F, ["the call has no closing </tool_call>"]),
        (f"<tool_call>{F}<tool_call>{G}</tool_call>", ["the call has no closing", None]),
        (block(""), ["the call is not JSON: Expecting value: line 1 column 1 (char 0)"]),
        (block("f(x=1)"), ["the call is not JSON: "]),
        (block(F[:-1]), ["the call is not JSON: Expecting ',' delimiter"]),
        (block('{\n"name": "f",\n"arguments": {\n}'), ["the call is not JSON: "]),  # one, not four
        (block(F, "g()", G), [None, "the call is not JSON: ", None]),
        (block(F + F), ["the call is not JSON: Extra data"]),
        (block([]), ['the call must be a JSON object with "name" and "arguments"']),
        (block(3), ["the call must be a JSON object"]),
        (block({"arguments": {}}), ['the call has no "name" that is a string']),
        (block({"name": ["f"]}), ['the call has no "name"']),
        (block({"name": "f", "arguments": [1]}), ['"arguments" of the call must be a JSON object']),
        (block({"name": "f", "parameters": "{}"}), ['"parameters" of the call must be']),
        (block({"name": "f", "arguments": {}, "parameters": {}}), ["the call has"]),
        (block('{"name": "f", "arguments": {"x": NaN}}'), ["the call is not JSON: NaN"]),
        (block('{"name": ' + "[" * 65 + "]" * 65 + "}"), ["the call is not JSON: nested deeper"]),
        (block('{"name": ' + "1" * 5000 + "}"), ["the call is not JSON: Exceeds the limit"]),
        (block("[" * 100_000), ["the call is not JSON: nested deeper than 64"]),
    ],
)
def test_calls_that_cannot(turn: str, problems: list[str | None]):
    calls = read_calls(turn, "tool_call")
    assert len(calls) == len(problems)
    for call, problem in zip(calls, problems, strict=True):
        if problem is None:
            assert isinstance(call, Call)
        else:
            assert isinstance(call, BadCall) and call.problem.startswith(problem)


# ---- what is answered and counted ----------------------------------------------------------------


def test_a_call_is_answered():
    assert step(block(calc("12 * 34"))) == EnvironmentStep(
        observation="<tool_response>\n408\n</tool_response>", rewards=counts(calls=1, used_tool=1)
    )


def test_a_turn_without_a_call_ends_it():
    assert step("<answer>408</answer>") == EnvironmentStep(rewards=counts(), done=True)


def test_several_calls_are_answered_in_order():
    turn = block(calc("1 + 1"), calc("2 + 2", "parameters")) + block(calc("3 + 3"))
    assert step(turn) == EnvironmentStep(
        observation="\n".join(f"<tool_response>\n{n}\n</tool_response>" for n in (2, 4, 6)),
        rewards=counts(calls=3, used_tool=1),
    )


@pytest.mark.parametrize(
    ("call", "says", "counted"),
    [
        ("nonsense", "Error: the call is not JSON: ", {"call_errors": 1}),
        (
            {"name": "calculater", "arguments": {}},
            "Error: there is no tool 'calculater'; did you mean 'calculator'?",
            {"call_errors": 1},
        ),
        (
            {"name": "n" * 1000},
            f"Error: there is no tool '{'n' * 50}'; choices: calculator",
            {"call_errors": 1},
        ),
        (
            {"name": "calculator"},
            "Error: wrong arguments: 'expression' is a required property",
            {"call_errors": 1},
        ),
        (
            calc(12),
            "Error: wrong arguments: 'expression': 12 is not of type 'string'",
            {"call_errors": 1},
        ),
        (
            {"name": "calculator", "arguments": {"expression": "1", "digits": 3}},
            "Error: wrong arguments: Additional properties are not allowed ('digits' was unex",
            {"call_errors": 1},
        ),
        (calc(["x" * 1000]), "Error: wrong arguments: 'expression': ['xxx", {"call_errors": 1}),
        (calc("1 / 0"), "Error: division by zero", {"tool_errors": 1}),
    ],
)
def test_what_is_wrong_is_said_and_counted(call: Any, says: str, counted: dict[str, int]):
    done = step(block(call))
    assert done.observation.startswith(f"<tool_response>\n{says}")
    assert len(done.observation) < 300
    assert done.rewards == counts(**counted) and not done.done


def test_good_and_bad_calls_in_one_turn():
    done = step(block(calc("1 + 1"), "?", calc("1 / 0"), calc("2 + 2")))
    answers = done.observation.split("<tool_response>\n")[1:]
    assert [it.splitlines()[0][:6] for it in answers] == ["2", "Error:", "Error:", "4"]
    assert done.rewards == counts(calls=2, call_errors=1, tool_errors=1)


def test_calls_beyond_the_limit_are_not_made():
    made: list[int] = []

    def note(n: int) -> str:
        made.append(n)
        return "noted"

    environment = ToolsEnvironment(["calculator"], max_calls_per_turn=2)
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    environment._tools["note"] = Tool(name="note", description="", parameters=schema, function=note)
    calls = [{"name": "note", "arguments": {"n": n}} for n in range(5)]
    done = environment.step(block(*calls))
    assert made == [0, 1]
    assert done.observation.splitlines()[-2] == (
        "Error: of the 5 calls of this turn, only the first 2 were answered"
    )
    assert done.rewards == counts(calls=2, call_errors=3)


def test_the_same_turn_is_always_answered_alike():
    environment = ToolsEnvironment(["calculator"])
    environment.reset(Task(prompt="p"))
    turns = [block(calc("1 / 7")), block("?"), block(calc("2")), "the end"]
    first = [environment.step(turn) for turn in turns]
    again = ToolsEnvironment(["calculator"])
    again.reset(Task(prompt="p"))
    for turn in turns[:2]:
        again.step(turn)
    assert [again.step(turn) for turn in turns[2:]] == first[2:]


def test_tags_and_surroundings():
    turn = block(calc("1 + 1")).replace("tool_call", "call")
    assert (
        step(turn, call_tag="call", response_tag="result").observation == "<result>\n2\n</result>"
    )
    assert step(turn, call_tag="call", response_tag=None, surround="\n").observation == "\n2\n"
    assert step(turn).done  # by its default tag there is no call in it


def test_long_answers_lose_their_middle():
    turn = block(calc("10 ** 999 + 7"))
    whole = step(turn, response_tag=None).observation
    assert whole == "1" + "0" * 998 + "7"
    cut = step(turn, response_tag=None, max_result_characters=11).observation
    assert cut == "10000\n[989 characters cut]\n000007"


def test_what_is_no_text_for_a_tokenizer_is_replaced():
    observation = step('<tool_call>{"name": "\\ud800"}</tool_call>').observation
    assert "there is no tool '?'" in observation
    observation.encode()


# ---- the section ---------------------------------------------------------------------------------


def _problem(**args: Any) -> str:
    with pytest.raises(InputError) as caught:
        environment_factory("tools", args)
    (problem,) = caught.value.problems
    return problem.removeprefix("rollout.environment.args: ")


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        ({"tools": []}, "tools is []; give a list of at least one tool"),
        ({"tools": "calculator"}, "tools is 'calculator'; give a list"),
        ({"tools": ["calculater"]}, "tools[0]: no tool named 'calculater'; did you mean 'calc"),
        ({"tools": ["calculator", 3]}, "tools[1]: 3 is no tool; give a name, or {type"),
        ({"tools": ["calculator", "calculator"]}, "tools[1]: there is a tool 'calculator' already"),
        ({"tools": [{"type": "calculator", "arg": {}}]}, "tools[0]: unknown key 'arg'; a tool has"),
        (
            {"tools": [{"type": "calculator", "args": {"digits": 3}}]},
            "tools[0]: 'calculator' refuses its args {'digits': 3}: got an unexpected keyword",
        ),
        (
            {"tools": [{"type": "calculator", "args": {"significant_digits": 0}}]},
            "tools[0]: 'calculator' refuses its args {'significant_digits': 0}: significant_dig",
        ),
        ({"tools": ["./none.py:f"]}, "tools[0]: tool './none.py:f': no file "),
        ({"tools": ["calculator"], "call_tag": "<call>"}, "call_tag is '<call>'; give the tag's"),
        ({"tools": ["calculator"], "response_tag": ""}, "response_tag is ''; give the tag's name"),
        ({"tools": ["calculator"], "surround": 1}, "surround is 1, not a text"),
        ({"tools": ["calculator"], "max_calls_per_turn": 0}, "max_calls_per_turn is 0; give a who"),
        ({"tools": ["calculator"], "max_result_characters": True}, "max_result_characters is True"),
    ],
)
def test_what_is_wrong_with_the_section(args: dict[str, Any], problem: str):
    assert _problem(**args).startswith(problem)


def test_missing_tools():
    assert "tools" in _problem()


USER_TOOLS = """
from gdpo_megatron.environments.tools import Tool, ToolError

def lookup(answer="none"):
    def search(word):
        if word == "boom":
            raise KeyError(word)
        if word == "number":
            return 3
        if word == "gone":
            raise ToolError("nothing found")
        return answer
    schema = {"type": "object", "properties": {"word": {"type": "string", "pattern": "^[a-z]+$"}}}
    return Tool(name="search", description="Look up.", parameters=schema, function=search)

def no_tool():
    return 3

def no_object():
    return Tool(name="t", description="", parameters={"type": "array"}, function=str)

def bad_schema():
    schema = {"type": "object", "properties": 3}
    return Tool(name="t", description="", parameters=schema, function=str)
"""


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(USER_TOOLS)
    return tmp_path


def test_a_tool_of_ones_own(user_file: Path):
    specs = [{"type": "./mine.py:lookup", "args": {"answer": "a fruit"}}]
    environment = environment_factory("tools", {"tools": specs}, user_file)()
    environment.reset(Task(prompt="p"))

    def ask(word: str) -> EnvironmentStep:
        return environment.step(block({"name": "search", "arguments": {"word": word}}))

    assert ask("apple").observation == "<tool_response>\na fruit\n</tool_response>"
    gone = ask("gone")
    assert gone.observation == "<tool_response>\nnothing found\n</tool_response>"
    assert gone.rewards == counts(tool_errors=1)
    assert ask("A1").rewards == counts(call_errors=1)
    # A fault of the tool is none of the model's.
    with pytest.raises(KeyError):
        ask("boom")
    with pytest.raises(TypeError, match="tool 'search' returned int, not a text"):
        ask("number")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("no_tool", "'./mine.py:no_tool' makes int, not a Tool"),
        ("no_object", 'parameters must have "type": "object"'),
        ("bad_schema", "parameters: no JSON Schema: 3 is not of type 'object'"),
        ("lokup", "did you mean 'lookup'?"),
    ],
)
def test_a_wrong_tool_of_ones_own(user_file: Path, name: str, problem: str):
    with pytest.raises(InputError) as caught:
        find_tools([f"./mine.py:{name}"], user_file)
    assert str(caught.value).startswith("tools[0]: ") and problem in str(caught.value)


def test_a_schema_cannot_hold_a_tool_up():
    schema = {"type": "object", "properties": {"x": {"type": "string", "pattern": "^(a|aa)+$"}}}
    tool = Tool(name="t", description="", parameters=schema, function=lambda x: "never")
    with pytest.raises(ArgumentsError, match="too long to check"):
        tool.call({"x": "a" * 60 + "!"})


def test_schemas_for_prompts():
    (schema,) = tool_schemas(["calculator"])
    assert schema["type"] == "function" and schema["function"]["name"] == "calculator"
    assert schema["function"]["parameters"]["required"] == ["expression"]


# ---- python --------------------------------------------------------------------------------------


class FakeSandbox:
    def __init__(self, done: Execution):
        self._done = done

    def run(self, program: str) -> Execution:
        assert program == "print(1)"
        return self._done


def run(monkeypatch: pytest.MonkeyPatch, **done: Any) -> EnvironmentStep:
    sandbox = FakeSandbox(Execution(**done))
    monkeypatch.setattr(python, "shared_sandbox", lambda: sandbox)
    call = {"name": "python", "arguments": {"code": "print(1)"}}
    return step(block(call), tools=["python"], response_tag=None)


TRACEBACK = """Traceback (most recent call last):
  File "main.py", line 9, in <module>
  File "main.py", line 5, in f
  File "main.py", line 2, in g
ZeroDivisionError: division by zero
"""


@pytest.mark.parametrize(
    ("done", "observation", "fine"),
    [
        ({"status": Status.OK, "stdout": " 1\n\n"}, " 1", True),
        ({"status": Status.OK, "stdout": "\n"}, "(the program printed nothing)", True),
        ({"status": Status.OK, "stdout": "1", "stderr": "warning"}, "1", True),
        (
            {"status": Status.RUNTIME_ERROR, "stdout": "1\n", "stderr": TRACEBACK, "exit_code": 1},
            "1\n" + TRACEBACK.rstrip(),
            False,
        ),
        (
            {"status": Status.RUNTIME_ERROR, "stderr": f"first\n{TRACEBACK}", "exit_code": 1},
            TRACEBACK.rstrip(),  # its last five lines
            False,
        ),
        ({"status": Status.RUNTIME_ERROR, "exit_code": 3}, "exit code 3", False),
        ({"status": Status.COMPILE_ERROR, "stderr": "SyntaxError: x"}, "SyntaxError: x", False),
        (
            {"status": Status.TIMEOUT, "stdout": "1"},
            "1\nthe program took too long and was ended",
            False,
        ),
        ({"status": Status.MEMORY}, "the program used too much memory and was ended", False),
        ({"status": Status.OUTPUT_LIMIT}, "the program printed too much and was ended", False),
        (
            {"status": Status.DENIED, "stderr": "PermissionError: x"},
            "PermissionError: x\nthe program did something that is not allowed here",
            False,
        ),
    ],
)
def test_what_comes_of_a_program(
    monkeypatch: pytest.MonkeyPatch, done: dict[str, Any], observation: str, fine: bool
):
    answered = run(monkeypatch, **done)
    assert answered.observation == observation
    assert answered.rewards == (counts(calls=1, used_tool=1) if fine else counts(tool_errors=1))


def test_a_failing_sandbox_is_no_answer(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(RuntimeError, match="the sandbox failed: gone"):
        run(monkeypatch, status=Status.INFRA_ERROR, detail="gone")


def test_who_needs_a_sandbox():
    with_python = ToolsEnvironment(["calculator", "python"])
    assert is_sandbox_user(with_python) and not is_sandbox_user(ToolsEnvironment(["calculator"]))
    # Two tries of 10 s each, begun just before the time of the turn is over.
    assert with_python.longest_step_seconds == 40.0
    assert ToolsEnvironment(["python"], max_calls_per_turn=1).longest_step_seconds == 20.0
    assert ToolsEnvironment(["calculator"]).longest_step_seconds == 0.0


def test_programs_that_took_too_long_are_the_last_of_their_turn(monkeypatch: pytest.MonkeyPatch):
    clock = SimpleNamespace(now=100.0)

    class Slow:
        def run(self, program: str) -> Execution:
            clock.now += 9.0
            return Execution(status=Status.OK, stdout=program)

    from gdpo_megatron.environments.tools import environment

    monkeypatch.setattr(environment, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(python, "shared_sandbox", Slow)
    calls = [{"name": "python", "arguments": {"code": str(n)}} for n in range(5)]
    done = step(block(*calls), tools=["python", "calculator"], response_tag=None)
    late = "Error: not run: the calls before it took too long"
    assert done.observation == f"0\n1\n2\n{late}\n{late}"  # 20 s were over after the third
    assert done.rewards == counts(calls=3, tool_errors=2)
