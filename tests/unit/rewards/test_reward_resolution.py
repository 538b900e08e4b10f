"""From config to functions: built-ins, files, entry points, arguments; all problems at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gdpo_megatron import registry
from gdpo_megatron.config.reward import GateConfig, RewardConfig
from gdpo_megatron.errors import InputError
from gdpo_megatron.rewards import REWARDS, RewardSample, register_reward, resolve_rewards


def reward(name: str = "r", type: str = "gsm8k_integer", **fields: Any) -> RewardConfig:
    return RewardConfig(name=name, type=type, **fields)


def problems(*rewards: RewardConfig, base_dir: Path | None = None) -> list[str]:
    with pytest.raises(InputError) as error:
        resolve_rewards(rewards, base_dir)
    return error.value.problems


def test_builtins_are_registered():
    assert {
        "tool_call_format",
        "tool_call_correctness",
        "gsm8k_correctness",
        "gsm8k_integer",
        "gsm8k_format",
        "contains",
        "quoted_speech",
        "length",
    } <= set(REWARDS.names())


def test_order_names_and_weights_follow_the_config():
    resolved = resolve_rewards(
        [reward("b", weight=0.5), reward("a", "length", args={"limit": 3}, weight=2.0)]
    )
    assert [(r.name, r.weight, r.args) for r in resolved] == [
        ("b", 0.5, {}),
        ("a", 2.0, {"limit": 3}),
    ]


def test_all_problems_are_reported_together():
    found = problems(
        reward("a", "gsm8k_integr"),
        reward("a", "length"),
        reward("b", "contains", args={"keywrd": "dog"}),
        reward("c", when=GateConfig(reward="bb", gte=1.0)),
    )
    assert found == [
        "rewards[1]: name 'a' is taken by rewards[0]",
        "rewards[3] 'c'.when.reward: no reward named 'bb'; did you mean 'b'?",
        "rewards[0] 'a': no reward named 'gsm8k_integr'; did you mean 'gsm8k_integer'?",
        "rewards[1] 'a': args.limit is missing; type 'length' needs it",
        "rewards[2] 'b': args.keyword is missing; type 'contains' needs it",
        "rewards[2] 'b': args.keywrd is unknown to type 'contains'; did you mean 'keyword'?",
    ]


def test_no_rewards_is_a_problem():
    assert problems() == ["rewards: at least one reward is needed"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"limit": "long"}, "args.limit is 'long': Input should be a valid integer"),
        ({"limit": 0}, "args.limit is 0: Input should be greater than 0"),
        (
            {"limit": 3, "sample": 1},
            "args.sample is unknown to type 'length'; choices: count_stop_token, limit",
        ),
    ],
)
def test_argument_values_are_checked(args: dict[str, Any], message: str):
    (problem,) = problems(reward("a", "length", args=args))
    assert problem.startswith("rewards[0] 'a': " + message)


def test_arguments_are_converted_as_annotated(registry_restored: None):
    @register_reward("converted")
    def converted(sample: RewardSample, words: tuple[str, ...], scale: float = 1.0) -> float:
        return scale * sum(word in sample.completion for word in words)

    (resolved,) = resolve_rewards(
        [reward(type="converted", args={"words": ["a", "b"], "scale": 2})]
    )
    assert resolved.args == {"words": ("a", "b"), "scale": 2.0}
    assert problems(reward(type="converted", args={"words": [], "scale": float("nan")})) == [
        "rewards[0] 'r': args.scale is nan: Input should be a finite number"
    ]


def test_unannotated_and_open_signatures(registry_restored: None):
    @register_reward("open")
    def anything(sample, /, bound=1, *, tag, **rest):
        return 0.0

    (resolved,) = resolve_rewards([reward(type="open", args={"tag": "t", "bound": "x", "y": []})])
    assert resolved.args == {"tag": "t", "bound": "x", "y": []}
    assert problems(reward(type="open", args={"sample": 1})) == [
        "rewards[0] 'r': args.tag is missing; type 'open' needs it",
        "rewards[0] 'r': args.sample is unknown to type 'open'; choices: bound, tag",
    ]


@pytest.mark.parametrize(
    ("gates", "expected"),
    [
        ({"a": "a"}, ["rewards[0] 'a'.when.reward: the condition depends on itself: a -> a"]),
        (
            {"a": "b", "b": "c", "c": "a"},
            ["rewards[0] 'a'.when.reward: the condition depends on itself: a -> b -> c -> a"],
        ),
        (
            {"a": "b", "b": "c", "c": "b"},
            ["rewards[1] 'b'.when.reward: the condition depends on itself: b -> c -> b"],
        ),
    ],
)
def test_circular_conditions(gates: dict[str, str], expected: list[str]):
    rewards = [
        reward(name, when=GateConfig(reward=gates[name], gte=1.0) if name in gates else None)
        for name in "abc"
    ]
    assert problems(*rewards) == expected


def test_chained_conditions_are_fine():
    gates = {"a": "b", "b": "c"}
    resolved = resolve_rewards(
        [
            reward(n, when=GateConfig(reward=gates[n], gte=1.0) if n in gates else None)
            for n in "abc"
        ]
    )
    assert [r.when.reward if r.when else None for r in resolved] == ["b", "c", None]


FILE = """
from gdpo_megatron.rewards import register_reward

def plain(sample, bonus: int = 0):
    return 1.0 + bonus

async def waiting(sample):
    return 2.0

@register_reward("from_file_batch", batch=True)
def together(samples):
    return [3.0] * len(samples)

class Judge:
    def __init__(self, value=4.0):
        self.value = value
    def __call__(self, sample, bonus: int = 0):
        return self.value + bonus

class AsyncJudge:
    async def __call__(self, sample):
        return 5.0

judge, async_judge = Judge(), AsyncJudge()
number = 3

def no_sample():
    return 1.0
"""


def test_functions_from_a_file(tmp_path: Path, registry_restored: None):
    (tmp_path / "mine.py").write_text(FILE)
    names = ["plain", "waiting", "together", "judge", "async_judge"]
    resolved = resolve_rewards(
        [reward(name, f"./mine.py:{name}") for name in names], base_dir=tmp_path
    )
    assert [(r.fn.batch, r.fn.is_async) for r in resolved] == [
        (False, False),
        (False, True),
        (True, False),
        (False, False),
        (False, True),
    ]
    # What a file registers can be named, too; once its file has been loaded.
    assert REWARDS.get("from_file_batch") is resolved[2].fn.function


def test_file_problems_name_the_file(tmp_path: Path, registry_restored: None):
    (tmp_path / "mine.py").write_text(FILE)
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    (tmp_path / "taken.py").write_text(
        "from gdpo_megatron.rewards import register_reward\n"
        "@register_reward('length')\ndef mine(sample):\n    return 1.0\n"
    )
    found = problems(
        reward("a", "./absent.py:f"),
        reward("b", "./mine.py:plane"),
        reward("c", "./broken.py:f"),
        reward("d", "./taken.py:mine"),
        reward("e", "./mine.py:Judge"),
        reward("f", "./mine.py:number"),
        reward("g", "./mine.py:no_sample"),
        reward("h", "./mine.py:judge", args={"bonis": 1}),
        reward("i", "./mine.py:judge", args={"bonus": "x"}),
        base_dir=tmp_path,
    )
    expected = [
        f"no file {tmp_path / 'absent.py'}",
        "has no 'plane'; did you mean 'plain'?",
        "fails on import: ModuleNotFoundError",
        "reward 'length' is already registered",
        "is a class; name a function or an instance",
        "is int, which cannot be called",
        "must take the sample first",
        "args.bonis is unknown to type './mine.py:judge'; did you mean 'bonus'?",
        "args.bonus is 'x': Input should be a valid integer",
    ]
    assert len(found) == len(expected)
    for problem, part in zip(found, expected, strict=True):
        assert part in problem
        assert "\n" not in problem


class FakeEntryPoint:
    def __init__(self, name: str, function: Any):
        self.name = name
        self._function = function

    def load(self) -> Any:
        return self._function


def test_entry_points(monkeypatch: pytest.MonkeyPatch, registry_restored: None):
    def plain(sample: RewardSample) -> float:
        return 1.0

    def load_decorated() -> Any:
        # Importing the package's module runs the decorator, which registers the same function.
        return register_reward("decorated", batch=True)(lambda samples: [0.0] * len(samples))

    decorated = FakeEntryPoint("decorated", None)
    decorated.load = load_decorated
    asked: list[str] = []

    def entry_points(*, group: str) -> list[FakeEntryPoint]:
        asked.append(group)
        return [FakeEntryPoint("plain", plain), decorated]

    monkeypatch.setattr(registry, "entry_points", entry_points)
    monkeypatch.setattr(REWARDS, "_entry_point_group", "gdpo_megatron.rewards")
    resolved = resolve_rewards([reward("a", "plain"), reward("b", "decorated")])
    assert [r.fn.batch for r in resolved] == [False, True]
    assert asked == ["gdpo_megatron.rewards"]
    (problem,) = problems(reward("c", "plane"))
    assert problem.endswith("did you mean 'plain'?")


def test_a_name_is_registered_once(registry_restored: None):
    register_reward("once")(lambda sample: 1.0)
    with pytest.raises(ValueError, match="'once' is already registered"):
        register_reward("once")(lambda sample: 1.0)


def test_the_check_needs_no_torch():
    code = "import sys, gdpo_megatron.rewards; print({'torch', 'megatron'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"
