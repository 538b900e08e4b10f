"""The paper's runs: each full config passes every check that needs no GPU, and the forms compare.

Models are folders of the published shapes without weights, data a few rows in the prepared schema,
so layouts, batch arithmetic, sequence lengths, rewards and their conditions, answers, headers of
weight files and memory keys are checked as `train` does before it starts a rank. Not covered: that
vLLM is installed, memory and speed at this size, and that anything is learned.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from support.published_models import NUM_PARAMETERS, published_shapes, save_published_model

from gdpo_megatron.cli import main
from gdpo_megatron.config.loader import load_config
from gdpo_megatron.config.schema import RLConfig
from gdpo_megatron.errors import InputError
from gdpo_megatron.validate import validate

EXAMPLES = Path(__file__).parents[2] / "examples"
TASKS = ("tool_calling", "math", "code", "gsm8k")
FULL = sorted(
    path
    for task in TASKS
    for path in (EXAMPLES / task).glob("*.yaml")
    if path.stem.endswith(("_gdpo", "_grpo", "_grpo_no_std"))
)
GPUS = {"qwen3_30b_a3b_gdpo": 16}
"""Ranks where they are not 8."""

CALL = '<think> t </think>\n<tool_call>\n{"name": "f", "parameters": {"x": 1}}\n</tool_call>'
CODE = json.dumps({"inputs": ["1\n", "2\n"], "outputs": ["1\n", "2\n"]})
ROWS: dict[str, dict[str, Any]] = {
    "toolrl/train": {
        "prompt": [{"role": "system", "content": "tools"}, {"role": "user", "content": "q"}],
        "answer": CALL,
    },
    "math/deepscaler": {"prompt": [{"role": "user", "content": "2+3?"}], "answer": "\\frac{10}{2}"},
    "code/eurus": {"prompt": [{"role": "user", "content": "echo"}], "answer": CODE},
    "gsm8k/train": {"prompt": "How many?", "answer": "1,600"},
}
HELD_OUT = [{"role": "user", "content": "something else"}]
ROWS |= {
    "toolrl/test": ROWS["toolrl/train"] | {"prompt": HELD_OUT},
    **{
        f"math/{name}": ROWS["math/deepscaler"] | {"prompt": HELD_OUT}
        for name in ("math500", "aime24", "amc", "olympiad")
    },
    "gsm8k/test": ROWS["gsm8k/train"] | {"prompt": "How few?"},
}


@pytest.fixture(scope="module", autouse=True)
def published(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Models and data where the configs look for them."""
    folder = tmp_path_factory.mktemp("published")
    for name in NUM_PARAMETERS:
        save_published_model(folder / "models" / name, name)
    for name, row in ROWS.items():
        path = folder / "data" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"id": name, "source": name, **row}) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GDPO_MODELS", str(folder / "models"))
        patch.setenv("GDPO_DATA", str(folder / "data"))
        # The one check about the machine instead of the config.
        patch.setattr("gdpo_megatron.validate.vllm_problems", list)
        yield


def load(path: Path, *overrides: str) -> RLConfig:
    return load_config(RLConfig, path, overrides)


def name_of(path: Path) -> str:
    return str(path.relative_to(EXAMPLES))


def differences(one: Any, other: Any, prefix: str = "") -> set[str]:
    """Dotted keys in which two nested mappings differ."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return set() if one == other else {prefix}
    return {
        key
        for name in one.keys() | other.keys()
        for key in differences(one.get(name), other.get(name), f"{prefix}.{name}".lstrip("."))
    }


@pytest.mark.parametrize("name", list(NUM_PARAMETERS))
def test_shapes_are_the_published_ones(name: str):
    """By the number of parameters, which the checkpoints' pages state."""
    number = 0
    for shape in published_shapes(name).values():
        size = 1
        for extent in shape:
            size *= extent
        number += size
    assert number == NUM_PARAMETERS[name]


@pytest.mark.parametrize("path", FULL, ids=name_of)
def test_full_config_is_valid(path: Path):
    validate("train", load(path), path.parent, world_size=GPUS.get(path.stem, 8))


@pytest.mark.parametrize(
    "name",
    [
        "tool_calling/qwen2.5_1.5b_gdpo",
        "math/qwen3_30b_a3b_gdpo",
        "code/r1_7b_gdpo",
        "gsm8k/qwen2.5_1.5b_gdpo",
    ],
)
def test_validate_tells_how_a_run_starts(name: str, capsys: pytest.CaptureFixture[str]):
    """The command, for GPUs that are not here; each reward gives a row's own answer a score."""
    path = EXAMPLES / f"{name}.yaml"
    world = GPUS.get(path.stem, 8)
    with pytest.raises(SystemExit) as ended:
        main(["validate", str(path), "--world-size", str(world), "--gpu", "h100-80"])
    told = capsys.readouterr()
    assert ended.value.code == 0, told.err
    for reward in load(path).rewards:
        assert f"  {reward.name}: answers " in told.out or "they need a sandbox" in told.out
    assert f"--nproc 8 --nnodes {world // 8}" in told.out or world == 8
    assert f"sbatch --nodes={world // 8} --gpus-per-node=8 " in told.out


def test_the_evaluation_of_the_math_runs_is_valid():
    path = EXAMPLES / "math/eval.yaml"
    config = load(path)
    validate("eval", config, path.parent, world_size=8)
    assert (config.eval.samples_per_prompt, config.eval.max_completion_tokens) == (16, 32768)
    assert (config.eval.temperature, config.eval.top_p) == (0.6, 0.95)
    seven = ("--rollout.tensor_parallel_size", "2", "--model.hf_path")
    validate(
        "eval",
        load(path, *seven, f"{os.environ['GDPO_MODELS']}/DeepSeek-R1-Distill-Qwen-7B"),
        path.parent,
        world_size=8,
    )


def test_what_does_not_fit_is_found():
    """The checks above see a layout, a length and a condition that are wrong."""
    path = EXAMPLES / "math/r1_7b_gdpo.yaml"
    with pytest.raises(InputError, match="start a multiple of 8"):
        sizes = ("--parallel.pipeline_model_parallel_size", "4")
        validate("train", load(path, *sizes), path.parent, world_size=12)
    with pytest.raises(InputError, match="3 does not divide the model's 28 attention heads"):
        sizes = ("--parallel.tensor_model_parallel_size", "3")
        validate("train", load(path, *sizes), path.parent, world_size=12)
    with pytest.raises(InputError, match="leaves no room for a prompt"):
        long = ("--rollout.max_completion_tokens", "9024")
        validate("train", load(path, *long), path.parent, world_size=8)


def test_every_run_of_the_paper_is_there():
    found = {name_of(path).removesuffix(".yaml") for path in FULL}
    methods = ("gdpo", "grpo", "grpo_no_std")
    runs = (
        "tool_calling/qwen2.5_1.5b",
        "tool_calling/qwen2.5_3b",
        "math/r1_1.5b",
        "math/r1_7b",
        "math/qwen3_4b",
        "math/r1_7b_conditioned",
        "code/r1_7b",
        "code/r1_7b_two_rewards",
        "gsm8k/qwen2.5_1.5b",
    )
    expected = {f"{run}_{method}" for run in runs for method in methods}
    assert found == expected | {"math/qwen3_30b_a3b_gdpo"}


@pytest.mark.parametrize("path", [path for path in FULL if "grpo" in path.stem], ids=name_of)
def test_forms_differ_in_the_estimator_alone(path: Path):
    base, _, method = path.stem.partition("_grpo")
    twin = path.with_name(f"{base}_gdpo.yaml")
    found = differences(asdict(load(twin)), asdict(load(path)))
    # GRPO has no stage over the batch: nothing sets that key, its default goes with the estimator.
    assert found == {"run_dir", "advantage.estimator", "advantage.batch_norm"}
    assert load(path).advantage.estimator == f"grpo{method}"
    text = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert text == [
        f"defaults: {twin.name}",
        f"run_dir: ../../runs/{path.parent.name}/{path.stem}",
        f"advantage: {{estimator: grpo{method}}}",
    ]


def test_the_conditioned_form_differs_in_the_condition_alone():
    plain = load(EXAMPLES / "math/r1_7b_gdpo.yaml")
    conditioned = load(EXAMPLES / "math/r1_7b_conditioned_gdpo.yaml")
    assert differences(asdict(plain), asdict(conditioned)) == {"run_dir", "rewards"}
    (right, short), (same, gated) = plain.rewards, conditioned.rewards
    assert right == same
    assert differences(asdict(short), asdict(gated)) == {"when"}
    assert gated.when is not None and asdict(gated.when) == {"reward": "correctness", "gte": 1.0}


def test_the_weight_sweep_gives_valid_configs():
    script = EXAMPLES / "math/length_weights.sh"
    shown = subprocess.run([script, "--print"], capture_output=True, text=True, check=True).stdout
    seen: set[tuple[str, float]] = set()
    run_dirs: set[str] = set()
    for line in shown.splitlines():
        found = re.fullmatch(r"gdpo-megatron train examples/(\S+) --nproc 8 (.*)", line)
        assert found is not None, line
        config = load(EXAMPLES / found[1], *found[2].split())
        seen.add((found[1], config.rewards[1].weight))
        run_dirs.add(config.run_dir)
        assert [it.name for it in config.rewards] == ["correctness", "length"]
        assert config.rewards[0].weight == 1.0
    files = [
        f"math/r1_7b{kind}_{it}.yaml" for kind in ("", "_conditioned") for it in ("gdpo", "grpo")
    ]
    assert seen == {(file, weight) for file in files for weight in (1.0, 0.75, 0.5, 0.25)}
    assert len(run_dirs) == 16


@pytest.mark.parametrize(
    ("name", "prompts", "group", "minibatches", "steps", "tokens", "clip_high", "kl"),
    [
        ("tool_calling/qwen2.5_1.5b", 512, 4, 4, 100, 1024, 0.2, (0.001, "k3")),
        ("tool_calling/qwen2.5_3b", 512, 4, 4, 100, 1024, 0.2, (0.001, "k3")),
        ("math/r1_1.5b", 512, 16, 8, 500, 8000, 0.28, (5e-4, "k2")),
        ("math/r1_7b", 512, 16, 8, 500, 8000, 0.28, (5e-4, "k2")),
        ("math/qwen3_4b", 512, 16, 8, 500, 8000, 0.28, (5e-4, "k2")),
        ("code/r1_7b", 512, 16, 8, 400, 8000, 0.28, (5e-4, "k2")),
        ("gsm8k/qwen2.5_1.5b", 32, 16, 1, 233, 1024, 0.2, (0.04, "k3")),
    ],
)
def test_values_of_the_paper(
    name: str,
    prompts: int,
    group: int,
    minibatches: int,
    steps: int,
    tokens: int,
    clip_high: float,
    kl: tuple[float, str],
):
    """Written from the paper and the released scripts, not from the files."""
    config = load(EXAMPLES / f"{name}_gdpo.yaml")
    rollout, loss = config.rollout, config.loss
    assert (rollout.num_prompts_per_step, rollout.group_size) == (prompts, group)
    assert (rollout.max_completion_tokens, rollout.temperature) == (tokens, 1.0)
    assert (config.train.num_minibatches_per_step, config.train.num_steps) == (minibatches, steps)
    assert (loss.clip_eps_low, loss.clip_eps_high) == (0.2, clip_high)
    assert (loss.kl_coef, loss.kl_estimator) == kl
    assert loss.aggregation == "token_mean"
    gsm8k = name.startswith("gsm8k")
    assert config.optimizer.lr == (5e-6 if gsm8k else 1e-6)
    filters = name.startswith(("math", "code"))
    assert config.dynamic_sampling.filter == ("weighted_sum" if filters else "none")
    assert (config.advantage.preset, config.advantage.estimator) == ("paper", "gdpo")
    assert [it.weight for it in config.rewards] == [1.0] * len(config.rewards)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tool_calling/qwen2.5_1.5b_gdpo", ("--advantage.preset", "nvlabs_verl")),
        ("tool_calling/qwen2.5_1.5b_gdpo", ("--loss.kl_coef", "0")),
        ("gsm8k/qwen2.5_1.5b_gdpo", ("--advantage.preset", "nvlabs_trl")),
        ("math/r1_7b_gdpo", ("--rewards.length.weight", "0.5")),
        ("math/r1_1.5b_gdpo", ("--rollout.engine", "native", "--rollout.vllm", "null")),
    ],
)
def test_what_the_page_offers_is_valid(name: str, words: tuple[str, ...]):
    page = (EXAMPLES.parent / "docs/tasks.md").read_text()
    assert all(f"{key} {value}" in page for key, value in zip(words[::2], words[1::2], strict=True))
    path = EXAMPLES / f"{name}.yaml"
    validate("train", load(path, *words), path.parent, world_size=8)
