"""Bad input ends in the launcher: exit code 2, one line per problem, nothing written.

Every line is compared as a whole. Not covered: what is wrong inside of weights (see
tests/unit/conversion), and disks that fill up.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.cli_job import Cli, Job, Outcome

from gdpo_megatron.platform.cpu import CpuPlatform


def refused(job: Job, run_cli: Cli, *arguments: str) -> list[str]:
    """The lines that a command is refused with; "{here}" stands for the job's folder."""
    before, starts = job.files(), list(job.started)
    outcome = run_cli(*arguments)
    assert outcome.code == 2, outcome
    assert outcome.out == "" and job.started == starts
    assert job.files() == before
    lines = outcome.err.splitlines()
    assert all(line.startswith("gdpo-megatron: ") for line in lines), lines
    return [line[15:].replace(str(job.folder), "{here}") for line in lines]


def test_the_job_is_right_as_it_is(job: Job, run_cli: Cli):
    """Otherwise the tests below would show nothing."""
    for command, config in (("train", "config.yaml"), ("sft", "sft.yaml")):
        assert run_cli(command, config, "--nproc", "2") == Outcome(0, "", "")
    commands = [worker for _, worker, _ in job.started]
    assert commands == [["train", "config.yaml"], ["sft", "sft.yaml"]]
    assert [options.world_size for options, _, _ in job.started] == [2, 2]


# ---- one problem each ----------------------------------------------------------------------------

HEADS = [
    "parallel.tensor_model_parallel_size 3 does not divide the model's 4 attention heads",
    "parallel.tensor_model_parallel_size 3 does not divide the model's 4 key/value heads",
]

OVERRIDES: dict[str, tuple[str, list[str]]] = {
    "unknown key": (
        "--optimizer.learning_rate 1e-5",
        ["optimizer.learning_rate: unknown key; did you mean 'lr'?"],
    ),
    "unknown section": (
        "--optimiser.lr 1e-5",
        ["optimiser: unknown key; did you mean 'optimizer'?"],
    ),
    "wrong type": (
        "--train.num_steps many",
        ['train.num_steps: "many" is not allowed; needs int > 0'],
    ),
    "float for int": (
        "--train.num_steps 2.5",
        ["train.num_steps: 2.5 is not allowed; needs int > 0"],
    ),
    "out of range": (
        "--rollout.top_p 1.5",
        ["rollout.top_p: 1.5 is not allowed; needs float from 0 to 1"],
    ),
    "reward override": (
        "--rewards.shrt.weight 2",
        ["--rewards.shrt.weight: no reward named 'shrt'; did you mean 'short'?"],
    ),
    "no value": ("--train.num_steps", ["--train.num_steps: no value follows"]),
    "tp does not divide": ("--parallel.tensor_model_parallel_size 3 --nproc 3", HEADS),
    "engine tp does not divide": (
        "--rollout.tensor_parallel_size 3 --nproc 3",
        [
            line.replace("parallel.tensor_model_parallel", "rollout.tensor_parallel")
            for line in HEADS
        ],
    ),
    "world does not fit": (
        "--parallel.tensor_model_parallel_size 2 --parallel.pipeline_model_parallel_size 2 "
        "--nproc 6",
        [
            "6 ranks (--nproc x --nnodes) do not fit parallel.tensor_model_parallel_size 2 x "
            "pipeline_model_parallel_size 2: start a multiple of 4"
        ],
    ),
    "world over nodes": (
        "--parallel.tensor_model_parallel_size 4 --nproc 3 --nnodes 2 --node-rank 0 "
        "--rdzv-endpoint here:29500",
        [
            "6 ranks (--nproc x --nnodes) do not fit parallel.tensor_model_parallel_size 4 x "
            "pipeline_model_parallel_size 1: start a multiple of 4"
        ],
    ),
    "engine ranks": (
        "--rollout.tensor_parallel_size 2 --nproc 1",
        ["rollout.tensor_parallel_size 2 does not divide 1 ranks"],
    ),
    "too many stages": (
        "--parallel.pipeline_model_parallel_size 3 --nproc 3",
        ["parallel.pipeline_model_parallel_size is 3, but the model has only 2 layers"],
    ),
    "stage layout": (
        "--parallel.pipeline_model_parallel_size 2 --nproc 2 "
        "--parallel.pipeline_model_parallel_layout Ettt|L",
        [
            "parallel.pipeline_model_parallel_layout: 'Ettt|L' has 2 stages and 3 layers, but "
            "there are 2 stages and 2 layers"
        ],
    ),
    "packed rows and context parallelism": (
        "--train.packing true --parallel.context_parallel_size 2 --nproc 2",
        [
            "train.packing is true, but parallel.context_parallel_size is 2: its ranks hold pieces "
            "of each row, and packed rows are not cut into any; set train.packing to false"
        ],
    ),
    "a budget of nothing": (
        "--train.max_tokens_per_micro_batch 0",
        ["train.max_tokens_per_micro_batch: 0 is not allowed; needs int > 0, or null"],
    ),
    "missing data": (
        "--data.train row.jsonl",
        ["data file {here}/row.jsonl: no such file; did you mean 'rows.jsonl'?"],
    ),
    "missing eval data": (
        "--data.eval no/such.jsonl",
        ["data file {here}/no/such.jsonl: there is no folder {here}/no"],
    ),
    "data of another kind": (
        "--data.train config.yaml",
        ["data file {here}/config.yaml: must be .jsonl or .parquet"],
    ),
    "prompt key": (
        "--data.prompt_key question",
        [
            "{here}/rows.jsonl:1: no field 'question' (data.prompt_key); choices: answer, prompt "
            "(also 2, 3, 4 and 1 more lines)"
        ],
    ),
    "prompts too long": (
        "--data.max_prompt_tokens 2",
        [
            "data file {here}/rows.jsonl: all 5 rows are longer than a prompt of 2 tokens; raise "
            "data.max_prompt_tokens or model.max_sequence_length"
        ],
    ),
    "no chat template": (
        "--data.system_prompt Be-brief.",
        [
            "{here}/rows.jsonl:1: tokenizer {here}/model has no chat template; give prompts as "
            "strings without data.system_prompt, or a tokenizer folder with a chat template "
            "(also 2, 3, 4 and 1 more lines)"
        ],
    ),
    "adapters of rank 0": (
        "--model.lora.rank 0",
        ["model.lora.rank: 0 is not allowed; needs int > 0"],
    ),
    "adapters nowhere": (
        "--model.lora.target_modules []",
        ["model.lora: target_modules is empty; nothing would be trained"],
    ),
    "adapters on no layer": (
        "--model.lora.target_modules [q_proj]",
        [
            'model.lora.target_modules: ["q_proj"] is not allowed; needs list, each one of '
            "linear_qkv, linear_proj, linear_fc1, linear_fc2"
        ],
    ),
    "adapters twice": (
        "--model.lora.target_modules [linear_fc1,linear_fc1]",
        ["model.lora: target_modules names a layer twice: ['linear_fc1', 'linear_fc1']"],
    ),
    "adapters of random weights": (
        "--model.lora {} --model.init random",
        [
            "model.init is random: adapters would belong to weights that are in no model folder; "
            "set model.lora: null, or model.init: pretrained"
        ],
    ),
    "no model": ("--model.hf_path modle", ["model.hf_path: no folder {here}/modle"]),
    "no tokenizer": (
        "--model.tokenizer_path nowhere",
        ["tokenizer {here}/nowhere: no such folder or file"],
    ),
    "sequence longer than the model": (
        "--model.max_sequence_length 129",
        ["model.max_sequence_length is 129, but the model has only 128 positions"],
    ),
    "tokens that the model does not have": (
        "--rollout.stop_token_ids [1,300,-2]",
        ["rollout.stop_token_ids: 300, -2 are no tokens of the model, which has 300"],
    ),
    "no room for a prompt": (
        "--rollout.max_completion_tokens 64",
        [
            "rollout.max_completion_tokens 64 leaves no room for a prompt in "
            "model.max_sequence_length 64"
        ],
    ),
    "unknown engine": (
        "--rollout.engine nativ",
        ["rollout.engine: no rollout engine named 'nativ'; did you mean 'native'?"],
    ),
    "an engine that is not installed": (
        "--rollout.engine vllm",
        [
            "rollout.engine: vLLM is not installed in this environment; scripts/setup.sh vllm "
            "makes an environment that has it"
        ],
    ),
    "settings of another engine": (
        "--rollout.vllm.kv_cache_gib 2",
        [
            "rollout.vllm is set, but rollout.engine is native; remove it, or set rollout.engine "
            "to vllm"
        ],
    ),
    "unknown estimator": (
        "--advantage.estimator gdpoo",
        ["no advantage estimator named 'gdpoo'; did you mean 'gdpo'?"],
    ),
    "no estimator file": (
        "--advantage.estimator ./mine.py:best",
        ["advantage estimator './mine.py:best': no file {here}/mine.py"],
    ),
    "group of one": (
        "--rollout.group_size 1 --advantage.group_ddof 0",
        ["rollout.group_size is 1: a group of one has no advantage; use 2 or more"],
    ),
    "ddof": (
        "--advantage.group_ddof 4",
        ["advantage.group_ddof 4 must be below rollout.group_size 4"],
    ),
    "minibatches": (
        "--train.num_minibatches_per_step 5",
        [
            "train.num_minibatches_per_step 5 is more than rollout.num_prompts_per_step 4; each "
            "needs a prompt"
        ],
    ),
    "over-provisioning with a filter": (
        "--rollout.long_tail.over_provision 0.5 --dynamic_sampling.filter advantage",
        [
            "rollout.long_tail.over_provision is 0.5, but dynamic_sampling.filter is advantage, "
            "which chooses the groups by their rewards and draws more of its own; set one of the "
            "two to its default"
        ],
    ),
    "a stall longer than the others wait": (
        "--rollout.stall_timeout_seconds 1800",
        [
            "rollout.stall_timeout_seconds is 1800, but the other ranks wait for an engine for "
            "1800 s only (launch.collective_timeout_seconds); take 1740 or less, or let them wait "
            "longer"
        ],
    ),
    "less than a completion": (
        "--rollout.long_tail.max_aborted_fraction 0.05",
        [
            "rollout.long_tail.max_aborted_fraction 0.05 of a step's 16 completions is less than "
            "one; raise it, or set it to 0"
        ],
    ),
    "no such engine file": (
        "--rollout.engine ./engine.py:factory",
        [
            "rollout.engine: rollout engine './engine.py:factory': no file {here}/engine.py",
        ],
    ),
    "greedy training": (
        "--rollout.temperature 0",
        [
            "rollout.temperature is 0: greedy samples have no log-probs to train on; use a "
            "temperature above 0, such as 1.0"
        ],
    ),
    "lr below its end": (
        "--optimizer.min_lr 1",
        ["optimizer.min_lr 1.0 is above optimizer.lr 1e-06"],
    ),
    "nothing to evaluate": (
        "--train.eval_interval 2",
        ["data.eval, eval.sets: train.eval_interval needs held-out rows; set one of them"],
    ),
    "primary reward": (
        "--dynamic_sampling.filter primary_reward --dynamic_sampling.primary_reward rihgt",
        ["dynamic_sampling.primary_reward: no reward named 'rihgt'; did you mean 'right'?"],
    ),
    "run_dir is a file": ("--run_dir rows.jsonl", ["run_dir: {here}/rows.jsonl is a file"]),
    "run_dir below a file": ("--run_dir rows.jsonl/run", ["run_dir: {here}/rows.jsonl is a file"]),
    "nodes without a place": (
        "--nnodes 2",
        ["--nnodes above 1 needs --rdzv-endpoint HOST:PORT of the first node"],
    ),
    "node rank": (
        "--nnodes 2 --node-rank 2 --rdzv-endpoint here:1",
        ["--node-rank is 2; with --nnodes 2: 0 to 1"],
    ),
    "endpoint": (
        "--nnodes 2 --node-rank 1 --rdzv-endpoint here",
        ["--rdzv-endpoint is 'here'; needs HOST:PORT"],
    ),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_overrides(job: Job, run_cli: Cli, name: str):
    options, expected = OVERRIDES[name]
    lines = refused(job, run_cli, "train", "config.yaml", *options.split())
    if name == "no value":
        assert [line.partition(" (")[0] for line in lines] == expected
    else:
        assert lines == expected


CHANGES: dict[str, tuple[Mapping[str, Any], list[str]]] = {
    "no rewards": ({"rewards": []}, ["rewards: at least one reward is needed"]),
    "unknown reward": (
        {"rewards": [{"name": "right", "type": "gsm8k_corectness"}]},
        [
            "rewards[0] 'right': no reward named 'gsm8k_corectness'; "
            "did you mean 'gsm8k_correctness'?",
        ],
    ),
    "reward file": (
        {"rewards": [{"name": "mine", "type": "./mine.py:score"}]},
        ["rewards[0] 'mine': reward './mine.py:score': no file {here}/mine.py"],
    ),
    "reward argument": (
        {"rewards": [{"name": "short", "type": "length", "args": {"limt": 3}}]},
        [
            "rewards[0] 'short': args.limit is missing; type 'length' needs it",
            "rewards[0] 'short': args.limt is unknown to type 'length'; did you mean 'limit'?",
        ],
    ),
    "condition": (
        {
            "rewards": [
                {
                    "name": "short",
                    "type": "length",
                    "args": {"limit": 3},
                    "when": {"reward": "rigth", "gte": 1},
                },
                {"name": "right", "type": "gsm8k_correctness"},
            ]
        },
        ["rewards[0] 'short'.when.reward: no reward named 'rigth'; did you mean 'right'?"],
    ),
    "no data section": ({"data": None}, ["data.train: missing; train needs a file of rows"]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_config_files(job: Job, run_cli: Cli, name: str):
    changes, expected = CHANGES[name]
    job.edit(changes)
    assert refused(job, run_cli, "train", "config.yaml") == expected


def test_adapters_on_experts(
    job: Job,
    run_cli: Cli,
    model_folder: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
):
    (job.folder / "model").unlink()
    (job.folder / "model").symlink_to(model_folder("qwen3_moe"))
    capsys.readouterr()  # transformers shows how it writes the model
    assert refused(job, run_cli, "train", "config.yaml", "--model.lora.rank", "4") == [
        "model.lora.target_modules: qwen3_moe has no linear_fc1, linear_fc2, whose experts get no "
        "adapters; choices: linear_qkv, linear_proj"
    ]
    targets = ("--model.lora.target_modules", "[linear_qkv]")
    assert run_cli("train", "config.yaml", *targets).code == 0


def test_experts_shared_by_ranks_that_have_unequal_numbers_of_tokens(
    job: Job,
    run_cli: Cli,
    model_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    (job.folder / "model").unlink()
    (job.folder / "model").symlink_to(model_folder("qwen3_moe"))
    shared = ("--nproc", "4", "--parallel.expert_tensor_parallel_size", "2")
    shared += ("--parallel.tensor_model_parallel_size", "2", "--parallel.sequence_parallel", "true")
    capsys.readouterr()  # transformers shows how it writes the model
    both = (*shared, "--parallel.expert_model_parallel_size", "2")
    assert refused(job, run_cli, "train", "config.yaml", *both) == [
        "parallel.expert_tensor_parallel_size is 2, but with expert parallelism its ranks exchange "
        "unequal numbers of tokens, which gloo cannot gather on this platform (cpu); set it to 1"
    ]
    # Without expert parallelism all of a rank's tokens stay, so the numbers are equal.
    assert run_cli("train", "config.yaml", *shared).code == 0
    monkeypatch.setattr(CpuPlatform, "gathers_uneven_parts", True)
    assert run_cli("train", "config.yaml", *both).code == 0


def test_a_run_goes_on_with_the_adapters_it_began_with(job: Job, run_cli: Cli):
    lora = ("--model.lora.rank", "4", "--model.lora.target_modules", "[linear_qkv]")
    assert run_cli("train", "config.yaml", *lora).code == 0
    done = job.folder / "run/checkpoints/step_00000002"
    assert run_cli("train", "config.yaml").code == 0  # there is nothing yet to go on from
    assert run_cli("train", "config.yaml", *lora).code == 0
    done.mkdir(parents=True)
    (done / "run.json").write_text("{}")
    assert run_cli("train", "config.yaml", *lora).code == 0
    before = "model.lora: the checkpoints in {here}/run were made with rank 4, alpha 32.0, "
    before += 'target_modules ["linear_qkv"], the config says '
    after = "; go on as before, or with another run_dir"
    assert refused(job, run_cli, "train", "config.yaml") == [f"{before}null{after}"]
    assert refused(job, run_cli, "train", "config.yaml", *lora, "--model.lora.alpha", "8") == [
        f'{before}rank 4, alpha 8.0, target_modules ["linear_qkv"]{after}'
    ]


# ---- rows ----------------------------------------------------------------------------------------


def test_bad_rows_are_named_with_file_and_line(job: Job, run_cli: Cli):
    good = '{"prompt": "1 + 1 =", "answer": "#### 2"}\n'
    (job.folder / "rows.jsonl").write_text(good * 3 + '{"prompt": "x", \n' + good + "[1]\n" + good)
    assert refused(job, run_cli, "train", "config.yaml") == [
        "{here}/rows.jsonl:4: bad JSON: Expecting property name enclosed in double quotes "
        "(column 16)",
        "{here}/rows.jsonl:6: must be an object, is [1] (list)",
    ]


def test_answers_that_no_reward_could_score(job: Job, run_cli: Cli):
    job.write_rows([{"prompt": "1 + 1 =", "answer": a} for a in ("#### 2", "#### ", "#### 4")])
    lines = refused(job, run_cli, "train", "config.yaml")
    assert len(lines) == 1
    assert lines[0].startswith("{here}/rows.jsonl, row 'rows.jsonl:2': reward 'right': ")
    job.write_rows([{"prompt": "1 + 1 =", "answer": "#### "}] * 30)
    lines = refused(job, run_cli, "train", "config.yaml")
    assert len(lines) == 21 and lines[-1] == "{here}/rows.jsonl: 10 more problems"


def test_no_rows(job: Job, run_cli: Cli):
    job.write_rows([])
    assert refused(job, run_cli, "train", "config.yaml") == ["{here}/rows.jsonl: has no rows"]


def test_an_empty_prompt(job: Job, run_cli: Cli):
    job.write_rows([{"prompt": "", "answer": "#### 1"}])
    assert refused(job, run_cli, "train", "config.yaml") == [
        "{here}/rows.jsonl:1: the prompt is empty, and the tokenizer adds no begin token"
    ]


def test_some_rows_left_out_are_told_and_the_job_starts(
    job: Job, run_cli: Cli, caplog: pytest.LogCaptureFixture
):
    job.write_rows([{"prompt": p, "answer": "#### 1"} for p in ("1", "1 + 2 + 3 + 4 + 5 + 6")])
    assert run_cli("train", "config.yaml", "--data.max_prompt_tokens", "8").code == 0
    assert "1 of 2 rows are left out" in caplog.text and len(job.started) == 1


def test_sft_rows(job: Job, run_cli: Cli):
    job.write_rows([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], "pairs.jsonl")
    assert refused(job, run_cli, "sft", "sft.yaml") == [
        "{here}/pairs.jsonl:2: no field 'completion' (data.completion_key); choices: prompt"
    ]
    job.write_rows([{"prompt": "a" * 70, "completion": "b"}], "pairs.jsonl")
    assert refused(job, run_cli, "sft", "sft.yaml") == [
        "data file {here}/pairs.jsonl: all 1 rows are longer than 64 in all or a prompt of 64 "
        "tokens; raise data.max_prompt_tokens or model.max_sequence_length"
    ]


# ---- model folders -------------------------------------------------------------------------------


@pytest.fixture
def own_model(job: Job, model_folder: Callable[[str], Path]) -> Path:
    """A copy of the model in place of the link."""
    (job.folder / "model").unlink()
    shutil.copytree(model_folder("mha"), job.folder / "model")
    return job.folder / "model"


def test_a_model_without_weights(job: Job, run_cli: Cli, own_model: Path):
    (own_model / "model.safetensors").unlink()
    assert refused(job, run_cli, "train", "config.yaml") == [
        "model.hf_path: {here}/model holds no weights (model.safetensors or "
        "model.safetensors.index.json); set model.init: random to draw new ones"
    ]
    assert run_cli("train", "config.yaml", "--model.init", "random").code == 0


def test_a_model_without_config(job: Job, run_cli: Cli, own_model: Path):
    (own_model / "config.json").unlink()
    assert refused(job, run_cli, "train", "config.yaml") == [
        "model.hf_path: {here}/model has no config.json"
    ]
    (own_model / "config.json").write_text('{"model_type": "llama",\n}')
    lines = refused(job, run_cli, "train", "config.yaml")
    assert lines == [
        "{here}/model/config.json, line 2: not JSON: Expecting property name enclosed in "
        "double quotes"
    ]


def test_a_damaged_weight_file(job: Job, run_cli: Cli, own_model: Path):
    (own_model / "model.safetensors").write_bytes(b"not safetensors")
    (line,) = refused(job, run_cli, "train", "config.yaml")
    assert line.startswith("{here}/model/model.safetensors: damaged file: ")


def test_a_damaged_weight_index(job: Job, run_cli: Cli, own_model: Path):
    for text in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        (own_model / "model.safetensors.index.json").write_text(text)
        (line,) = refused(job, run_cli, "train", "config.yaml")
        assert line.startswith("{here}/model/model.safetensors.index.json")


def test_weights_of_another_model(job: Job, run_cli: Cli, own_model: Path):
    config = json.loads((own_model / "config.json").read_text())
    (own_model / "config.json").write_text(json.dumps(config | {"intermediate_size": 100}))
    lines = refused(job, run_cli, "train", "config.yaml")
    assert lines[0] == (
        "{here}/model: tensor 'model.layers.0.mlp.down_proj.weight' has shape [64, 96], "
        "config.json asks for [64, 100]"
    )
    assert len(lines) == 6


def test_an_unknown_family(job: Job, run_cli: Cli, own_model: Path):
    config = json.loads((own_model / "config.json").read_text())
    (own_model / "config.json").write_text(json.dumps(config | {"model_type": "lama"}))
    assert refused(job, run_cli, "train", "config.yaml") == [
        "no model family named 'lama'; did you mean 'llama'?"
    ]


def test_a_tokenizer_with_more_tokens_than_the_model(job: Job, run_cli: Cli, own_model: Path):
    config = json.loads((own_model / "config.json").read_text())
    (own_model / "config.json").write_text(json.dumps(config | {"vocab_size": 200}))
    lines = refused(job, run_cli, "train", "config.yaml", "--model.init", "random")
    assert len(lines) == 1 and lines[0].endswith(
        "the model only 200; set model.tokenizer_path to the model's own"
    )


# ---- run folders ---------------------------------------------------------------------------------


def test_a_run_folder_of_another_job(job: Job, run_cli: Cli):
    assert run_cli("sft", "sft.yaml").code == 0
    assert run_cli("sft", "sft.yaml").code == 0
    before = job.files()
    outcome = run_cli("train", "config.yaml", "--run_dir", "sft_run")
    assert (outcome.code, outcome.out) == (2, "") and job.files() == before
    assert outcome.err == (
        f"gdpo-megatron: run_dir: {job.folder}/sft_run holds a run of `sft`; `train` needs "
        "another one\n"
    )
    assert run_cli("train", "config.yaml").code == 0
    outcome = run_cli("sft", "sft.yaml", "--run_dir", "run")
    assert outcome.code == 2 and "holds a run of `train`" in outcome.err
    # Evaluating what a run has made goes into its folder.
    job.edit({"data.eval": "rows.jsonl"})
    assert run_cli("eval", "config.yaml").code == 0
    assert len(job.started) == 4


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_run_folder_without_permission(job: Job, run_cli: Cli):
    (job.folder / "locked").mkdir(mode=0o500)
    lines = refused(job, run_cli, "train", "config.yaml", "--run_dir", "locked/run")
    assert lines == ["run_dir: no permission to write in {here}/locked"]


# ---- together, and for real ----------------------------------------------------------------------


def test_all_problems_of_the_config_are_reported_together(job: Job, run_cli: Cli):
    lines = refused(
        job,
        run_cli,
        *("train", "config.yaml", "--optimizer.lr", "fast", "--train.num_step", "3"),
        *("--rollout.group_size", "0", "--rewards.right.weigth", "2"),
    )
    assert sorted(lines) == [
        'optimizer.lr: "fast" is not allowed; needs float > 0',
        "rewards.right.weigth: unknown key; did you mean 'weight'?",
        "rollout.group_size: 0 is not allowed; needs int > 0",
        "train.num_step: unknown key; did you mean 'num_steps'?",
    ]


def test_all_problems_of_the_job_are_reported_together(job: Job, run_cli: Cli, own_model: Path):
    """Of ranks, run folder, model, tokenizer, rewards, optimizer, estimator and both files."""
    (own_model / "model.safetensors").unlink()
    (job.folder / "rows.jsonl").write_text("{\n")
    job.edit(
        {
            "run_dir": "sft.yaml",
            "model.max_sequence_length": 4096,
            "model.tokenizer_path": "nowhere",
            "parallel.tensor_model_parallel_size": 3,
            "parallel.pipeline_model_parallel_size": 5,
            "advantage.estimator": "gpdo",
            "data.eval": "missing.jsonl",
            "rewards": [{"name": "right", "type": "gsm8k_corectness"}],
            "optimizer.min_lr": 1.0,
        }
    )
    lines = refused(job, run_cli, "train", "config.yaml", "--nproc", "2")
    starts = [
        "run_dir",
        "tokenizer {here}/nowhere",
        "model.max_sequence_length",
        "model.hf_path: {here}/model holds no weights",
        "2 ranks",
        *["parallel.tensor_model_parallel_size 3"] * 2,
        "parallel.pipeline_model_parallel_size is 5",
        "optimizer.min_lr",
        "rewards[0] 'right'",
        "no advantage estimator",
        "{here}/rows.jsonl:1: bad JSON",
        "data file {here}/missing.jsonl",
    ]
    assert len(lines) == len(starts)
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))


def test_eval_does_not_ask_for_what_only_training_needs(job: Job, run_cli: Cli):
    job.edit({"data.eval": "rows.jsonl", "data.train": "gone.jsonl", "rollout.temperature": 0})
    assert run_cli("eval", "config.yaml").code == 0
    job.edit({"data.eval": None})
    assert refused(job, run_cli, "eval", "config.yaml") == [
        "data.eval, eval.sets: eval needs held-out rows; set one of them"
    ]
    assert not (job.folder / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train"], "train needs a config file; see --help"),
        (["sft", "nothing.yaml"], "no config file nothing.yaml"),
        (["train", "model"], "no config file model"),
    ],
)
def test_the_config_file_itself(job: Job, run_cli: Cli, arguments: list[str], line: str):
    assert refused(job, run_cli, *arguments) == [line]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["trian", "config.yaml"],
        ["train", "config.yaml", "--nproc", "0"],
        ["train", "config.yaml", "--nproc", "two"],
        ["train", "config.yaml", "--nnodes", "-1"],
    ],
)
def test_what_the_parser_refuses(job: Job, run_cli: Cli, arguments: list[str]):
    outcome = run_cli(*arguments)
    assert outcome.code == 2 and "usage: gdpo-megatron" in outcome.err and not job.started
    if len(arguments) > 2:
        assert outcome.err.endswith(f"'{arguments[-1]}' is no positive integer\n")


def test_the_installed_command(job: Job):
    """The same through a process of its own: nothing but the line on stderr, no traceback."""
    before = job.files()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "gdpo_megatron.cli", "train", "config.yaml", "--nproc", "3"),
            *("--parallel.pipeline_model_parallel_size", "2"),
        ],
        cwd=job.folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "gdpo-megatron: 3 ranks (--nproc x --nnodes) do not fit "
        "parallel.tensor_model_parallel_size 1 x pipeline_model_parallel_size 2: "
        "start a multiple of 2\n"
    )
    assert job.files() == before
