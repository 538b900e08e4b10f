"""Files and overrides become a config, or one error that lists every problem.

The mechanics run on a small schema, so that they do not change with the real one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import pytest

from gdpo_megatron.config.explain import OTHER_NAMES
from gdpo_megatron.config.fields import DERIVED, walk
from gdpo_megatron.config.loader import dump_config, load_config
from gdpo_megatron.config.schema import RLConfig, SFTConfig
from gdpo_megatron.config.section import PositiveFloat, PositiveInt, UnitFloat, section
from gdpo_megatron.errors import InputError


@section
class Optimizer:
    """How it learns."""

    lr: PositiveFloat = 1e-6
    """Rate."""

    betas: tuple[UnitFloat, UnitFloat] = (0.9, 0.95)
    """Decay."""

    schedule: Literal["constant", "cosine"] = "constant"
    """Shape."""


@section
class Train:
    """How long."""

    num_steps: PositiveInt = 100
    """Steps."""

    shuffle: bool = True
    """Mix."""

    stop: tuple[str, ...] = ()
    """Strings."""


@section
class Data:
    """What from."""

    train: str
    """Rows."""

    eval: str | None = None
    """More rows."""

    template: str | None = None
    """Around a prompt."""


@section
class Gate:
    """A condition."""

    reward: str
    """Which."""

    gte: float
    """Bound."""


@section
class Reward:
    """One of them."""

    name: str
    """Its name."""

    type: str
    """What it does."""

    weight: float = 1.0
    """How much."""

    args: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Arguments."""

    when: Gate | None = None
    """If."""


@section
class Root:
    """All of it."""

    run_dir: str
    """Folder."""

    data: Data
    rewards: tuple[Reward, ...] = ()
    """The rewards."""

    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)


BASE = """
run_dir: runs/x
data: {train: rows.jsonl}
rewards:
  - {name: format, type: tags, args: {depth: 2}}
  - {name: length, type: limit, weight: 0.5}
"""


def write(folder: Path, text: str = BASE, name: str = "config.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def load(folder: Path, text: str, *overrides: str) -> Root:
    return load_config(Root, write(folder, text), overrides)


def problems_of(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        load(folder, text, *overrides)
    assert all("\n" not in line for line in caught.value.problems)
    return caught.value.problems


def test_a_file_over_the_defaults(tmp_path: Path):
    config = load(tmp_path, BASE + "optimizer: {lr: 1e-4, betas: [0, 1]}\n")
    assert config == Root(
        run_dir="runs/x",
        data=Data(train="rows.jsonl"),
        rewards=(
            Reward(name="format", type="tags", args={"depth": 2}),
            Reward(name="length", type="limit", weight=0.5),
        ),
        optimizer=Optimizer(lr=1e-4, betas=(0.0, 1.0)),
    )


def test_all_problems_are_told_together_one_line_each(tmp_path: Path):
    text = """
run_dir: 3
data: {tran: x, template: [1]}
rewards:
  - {name: format, wieght: 2, type: t, when: {reward: x}}
  - {type: x, args: 3, weight: .inf}
  - 7
optimizer: {learning_rate: 1, lr: fast, betas: [0.9, 2, 3], schedule: cosin}
train:
  num_steps: 1.5
  lr: 2
  shuffle: yes
  shuffle: no
seeed: 1
"""
    assert problems_of(tmp_path, text, "--train.num_stepps", "3", "--rewards.frmat.weight=2") == [
        f"{tmp_path}/config.yaml:13: key 'shuffle' twice, first on line 12",
        "--rewards.frmat.weight: no reward named 'frmat'; did you mean 'format'?",
        "run_dir: 3 is not allowed; needs string",
        "data.train: missing; needs string",
        "data.template: [1] is not allowed; needs string, or null",
        "data.tran: unknown key; did you mean 'train'?",
        "rewards.format.when.gte: missing; needs float",
        "rewards.format.wieght: unknown key; did you mean 'weight'?",
        "rewards[1].name: missing; needs string",
        "rewards[1].weight: .inf is not allowed; needs finite float",
        "rewards[1].args: 3 is not allowed; needs mapping",
        "rewards[2]: 7 is not allowed; needs a section (name, type, weight, args, when)",
        'optimizer.lr: "fast" is not allowed; needs float > 0',
        "optimizer.betas: [0.9, 2, 3] is not allowed; needs list of 2, each float from 0 to 1",
        'optimizer.schedule: "cosin" is not allowed; needs one of constant, cosine',
        "optimizer.learning_rate: unknown key; did you mean 'lr'?",
        "train.num_steps: 1.5 is not allowed; needs int > 0",
        'train.shuffle: "no" is not allowed; needs true or false',
        "train.lr: unknown key; 'lr' belongs to optimizer",
        "train.num_stepps: unknown key; did you mean 'num_steps'?",
        "seeed: unknown key; choices: data, optimizer, rewards, run_dir, train",
    ]


@pytest.mark.parametrize(
    ("value", "is_right"),
    [("3", True), ("3.0", False), ("'3'", False), ("true", False), ("0", False), ("null", False)],
)
def test_an_int_is_an_int(tmp_path: Path, value: str, is_right: bool):
    text = f"{BASE}train: {{num_steps: {value}}}\n"
    if is_right:
        assert load(tmp_path, text).train.num_steps == 3
    else:
        assert len(problems_of(tmp_path, text)) == 1


def test_a_float_takes_an_int_and_no_string(tmp_path: Path):
    config = load(tmp_path, BASE + "optimizer: {lr: 1}\n")
    assert config.optimizer.lr == 1.0
    assert isinstance(config.optimizer.lr, float)
    assert problems_of(tmp_path, BASE + "optimizer: {lr: '1'}\n") == [
        'optimizer.lr: "1" is not allowed; needs float > 0'
    ]


def test_missing_sections_are_told_as_their_required_keys(tmp_path: Path):
    assert problems_of(tmp_path, "") == [
        "run_dir: missing; needs string",
        "data.train: missing; needs string",
    ]
    assert problems_of(tmp_path, BASE + "optimizer:\n") == [
        "optimizer: null is not allowed; needs a section (lr, betas, schedule)"
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("lr: 1", "lr: unknown key; 'lr' belongs to optimizer"),
        ("learning_rate: 1", "learning_rate: unknown key; did you mean optimizer.lr?"),
        ("num_step: 1", "num_step: unknown key; did you mean train.num_steps?"),
        ("optimiser: {lr: 1}", "optimiser: unknown key; did you mean 'optimizer'?"),
        ("optimizer: {run_dir: x}", "optimizer.run_dir: unknown key; 'run_dir' belongs to the top"),
        ("optimizer: {weight: 1}", "optimizer.weight: unknown key; 'weight' belongs to rewards[]"),
        ("train: {epochs: 1}", "train.epochs: unknown key; choices: num_steps, shuffle, stop"),
    ],
)
def test_hints_for_unknown_keys(tmp_path: Path, line: str, problem: str):
    (told,) = problems_of(tmp_path, f"{BASE}{line}\n")
    assert told.startswith(problem)


def test_overrides_in_both_forms(tmp_path: Path):
    config = load(
        tmp_path,
        BASE,
        *("--optimizer.lr", "2e-6", "--optimizer.betas=[0.5, 0.6]", "--run_dir", "here"),
        *("--train.stop", "[</a>, '1']", "--train.shuffle", "false", "--train.num_steps=7"),
        *("--train.num_steps", "8"),
    )
    assert config.optimizer == Optimizer(lr=2e-6, betas=(0.5, 0.6))
    assert config.train == Train(stop=("</a>", "1"), shuffle=False, num_steps=8)
    assert config.run_dir == "here"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Q: {question} A:", "Q: {question} A:"),
        ("[1", "[1"),
        ("123", "123"),
        ("true", "true"),
        ("-5", "-5"),
        ("null", None),
        ("'null'", "null"),
    ],
)
def test_a_string_key_takes_the_word_as_it_is(tmp_path: Path, text: str, value: str | None):
    assert load(tmp_path, BASE, "--data.template", text).data.template == value


def test_rewards_are_addressed_by_name(tmp_path: Path):
    config = load(
        tmp_path,
        BASE,
        *("--rewards.length.weight", "-2", "--rewards.format.args.deep.x=[1]"),
        *("--rewards.format.when", "{reward: length, gte: 1}", "--rewards.format.when.gte=0"),
    )
    assert config.rewards == (
        Reward(
            name="format",
            type="tags",
            args={"depth": 2, "deep": {"x": [1]}},
            when=Gate(reward="length", gte=0.0),
        ),
        Reward(name="length", type="limit", weight=-2.0),
    )


def test_an_override_merges_a_mapping_and_replaces_a_list(tmp_path: Path):
    text = BASE + "optimizer: {lr: 3, schedule: cosine}\n"
    config = load(tmp_path, text, "--optimizer", "{lr: 4}", "--rewards", "[{name: a, type: b}]")
    assert config.optimizer == Optimizer(lr=4.0, schedule="cosine")
    assert config.rewards == (Reward(name="a", type="b"),)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["x"], "'x': expected --section.key value"),
        (["--"], "'--': expected --section.key value"),
        (["--train.num_steps"], "--train.num_steps: no value follows"),
        (["--train.num_steps", "--run_dir", "x"], "--train.num_steps: no value follows"),
        (["--train.num_steps", "[1"], "--train.num_steps: '[1' is not YAML: while parsing"),
        (["--train.num_steps", "{a: 1, a: 2}"], "--train.num_steps: '{a: 1, a: 2}' is not YAML"),
        (["--train.num_steps.x", "1"], 'train.num_steps: {"x": 1} is not allowed; needs int > 0'),
        (["--train", "5"], "train: 5 is not allowed; needs a section (num_steps, shuffle, stop)"),
        (["--rewards.format", "1"], "--rewards.format: add one of its keys: name, type, weight"),
        (["--rewards.length.wieght", "1"], "rewards.length.wieght: unknown key; did you mean"),
        (["--rewards.0.weight", "1"], "--rewards.0.weight: no reward named '0'; choices: format"),
    ],
)
def test_bad_overrides(tmp_path: Path, words: list[str], problem: str):
    (told,) = problems_of(tmp_path, BASE, *words)
    assert told.startswith(problem)


def test_reward_names_are_unique_plain_words(tmp_path: Path):
    text = """
run_dir: x
data: {train: x}
rewards: [{name: a, type: t}, {name: a, type: u}, {name: b.c, type: t}, {name: x/y, type: t}]
"""
    assert problems_of(tmp_path, text) == [
        "rewards: name 'a' is used 2 times",
        "rewards: name 'b.c' may only hold letters, digits, _ and -",
        "rewards: name 'x/y' may only hold letters, digits, _ and -",
    ]


def test_variables_are_filled_in_in_paths_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STORE", "/store")
    monkeypatch.delenv("NOT_SET", raising=False)
    text = "run_dir: $STORE/x\ndata: {train: '${NOT_SET:-../up}/r', template: pay $STORE}\n"
    config = load(tmp_path, text, "--data.eval", "$STORE/e")
    assert config.run_dir == "/store/x"
    assert config.data == Data(train="../up/r", eval="/store/e", template="pay $STORE")
    assert problems_of(tmp_path, "run_dir: $NOT_SET\ndata: {train: x}\n", "--train.stop", "x") == [
        "run_dir: '$NOT_SET': environment variable NOT_SET is not set",
        'train.stop: "x" is not allowed; needs list of strings',
    ]
    assert problems_of(tmp_path, BASE, "--data.eval", "${NOT_SET}") == [
        "--data.eval: '${NOT_SET}': environment variable NOT_SET is not set"
    ]


def test_defaults_are_merged_below_the_file(tmp_path: Path):
    write(tmp_path, "optimizer: {lr: 1, schedule: cosine}\nrun_dir: base\n", "grand.yaml")
    write(tmp_path, "defaults: grand.yaml\noptimizer: {lr: 2}\n" + BASE[16:], "parent.yaml")
    text = "defaults: parent.yaml\ntrain: {num_steps: 3}\nrewards: [{name: only, type: t}]\n"
    config = load(tmp_path, text)
    assert config.optimizer == Optimizer(lr=2.0, schedule="cosine")
    assert config.train.num_steps == 3
    assert config.run_dir == "base"
    assert config.rewards == (Reward(name="only", type="t"),)
    assert load(tmp_path, "defaults: null\n" + BASE) == load(tmp_path, BASE)


def test_relative_paths_of_a_parent_start_at_the_parent(tmp_path: Path):
    parent = """
run_dir: runs
data: {train: ../rows.jsonl, eval: /abs/e.jsonl}
rewards: [{name: a, type: "./r.py:f"}, {name: b, type: plain}]
"""
    write(tmp_path, parent, "shared/base.yaml")
    path = write(tmp_path, "defaults: ../../shared/base.yaml\n", "examples/x/config.yaml")
    config = load_config(Root, path)
    assert config.run_dir == "../../shared/runs"
    assert config.data == Data(train="../../rows.jsonl", eval="/abs/e.jsonl")
    assert [reward.type for reward in config.rewards] == ["../../shared/r.py:f", "plain"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("defaults: nope.yaml\n", "config.yaml: defaults: no file "),
        ("defaults: [a]\n", "config.yaml: defaults: must name a YAML file, got ['a']"),
        ("defaults: config.yaml\n", "defaults form a circle: config.yaml -> config.yaml"),
        ("defaults: other.yaml\n", "defaults form a circle: config.yaml -> other.yaml -> config"),
    ],
)
def test_bad_defaults(tmp_path: Path, text: str, problem: str):
    write(tmp_path, "defaults: config.yaml\n", "other.yaml")
    (told,) = problems_of(tmp_path, text)
    assert problem in told


REAL = """
run_dir: $$odd/run
model: {hf_path: ../model}
data: {train: rows.jsonl, prompt_template: "1e-6"}
rewards:
  - {name: correctness, type: t}
  - {name: format, type: t, weight: 1e-3, args: {tag: "yes", n: [1, 2.5, null]},
     when: {reward: correctness, gte: 1}}
"""


def test_a_dumped_config_loads_to_an_equal_one(tmp_path: Path):
    config = load_config(RLConfig, write(tmp_path, REAL), ["--advantage.estimator", "grpo"])
    assert config.run_dir == "$odd/run"
    again = load_config(RLConfig, write(tmp_path, dump_config(config), "resolved.yaml"))
    assert again == config
    assert dump_config(again) == dump_config(config)


def test_a_dump_holds_every_key_in_the_order_of_the_schema(tmp_path: Path):
    dumped = dump_config(load_config(RLConfig, write(tmp_path, REAL)))
    sections = [
        line.split(":")[0] for line in dumped.splitlines() if not line.startswith((" ", "-"))
    ]
    assert sections == [entry.name for entry in dataclasses.fields(RLConfig)]
    assert "weights" not in dumped


@pytest.mark.parametrize("where", ["file", "command line"])
def test_the_weights_have_one_home(tmp_path: Path, where: str):
    text = REAL + ("advantage: {weights: {format: 2}}\n" if where == "file" else "")
    overrides = [] if where == "file" else ["--advantage.weights", "{format: 2}"]
    with pytest.raises(InputError) as caught:
        load_config(RLConfig, write(tmp_path, text), overrides)
    assert caught.value.problems == [
        "advantage.weights: the weights have one home: set rewards[].weight"
    ]


def test_the_derived_fields_exist_and_are_no_keys():
    known = {path for path, _ in walk(RLConfig)}
    for path in DERIVED:
        holder: Any = RLConfig
        for name in path.split("."):
            (entry,) = [it for it in dataclasses.fields(holder) if it.name == name]
            holder = entry.default_factory if entry.default_factory else None
        assert path not in known


def test_every_hint_leads_to_a_key():
    leaves = {path.rpartition(".")[2] for root in (RLConfig, SFTConfig) for path, _ in walk(root)}
    assert set(OTHER_NAMES.values()) <= leaves
    assert not set(OTHER_NAMES) & leaves
