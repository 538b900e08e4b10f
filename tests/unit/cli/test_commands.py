"""`--help` and `generate`, and what reaches the workers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.cli_job import Cli, Job

from gdpo_megatron import __version__
from gdpo_megatron.certify.family_models import reference_model
from gdpo_megatron.config.fields import walk
from gdpo_megatron.config.schema import RLConfig, SFTConfig
from gdpo_megatron.data.tokenizer import load_tokenizer


@pytest.mark.parametrize(
    ("command", "root"), [("train", RLConfig), ("sft", SFTConfig), ("eval", RLConfig)]
)
def test_help_documents_every_section_and_key(run_cli: Cli, command: str, root: type):
    outcome = run_cli(command, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome == run_cli(command, "-h")
    lines = outcome.out.splitlines()
    for path, key in walk(root):
        name = path.replace("[]", ".NAME") if key.section is None else path
        start = f"  --{name}  " if key.section is None else f"{path}"
        assert any(line.startswith(start) for line in lines), path
        words = " ".join(outcome.out.split())
        assert " ".join((key.doc or "").split())[:60] in words, path
    for option in ("--nproc", "--nnodes", "--node-rank", "--rdzv-endpoint"):
        assert any(line.startswith(f"  {option} ") for line in lines)
    assert max(len(line) for line in lines) <= 100


def test_help_names_every_command(run_cli: Cli):
    outcome = run_cli("--help")
    assert outcome.code == 0
    assert all(f"    {name} " in outcome.out for name in ("train", "sft", "eval", "generate"))
    assert run_cli("--version").out == f"{__version__}\n"
    outcome = run_cli("generate", "--help")
    assert outcome.code == 0 and "--max-completion-tokens" in outcome.out


def test_overrides_reach_the_workers_as_they_were_given(job: Job, run_cli: Cli):
    overrides = ["--rewards.right.weight=-0.5", "--data.prompt_template", "Q: {prompt} A:"]
    assert run_cli("train", "--nproc", "2", "config.yaml", *overrides).code == 0
    ((options, worker, unit),) = job.started
    assert worker == ["train", "config.yaml", *overrides] and unit == "step"
    assert (options.nproc, options.nnodes, options.node_rank) == (2, 1, None)


# ---- generate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer_file", ["tokenizer.json", "tokenizer.model"])
def test_generate_completes_as_transformers_does(
    tokenizer_file: str, stories_folder: Path, tmp_path: Path, run_cli: Cli
):
    """After a conversion there and back, which is bit for bit; with either tokenizer."""
    for source, target, kind in (
        (stories_folder, tmp_path / "megatron", "megatron"),
        (tmp_path / "megatron", tmp_path / "hf", "hf"),
    ):
        assert run_cli("convert", str(source), str(target), "--to", kind).code == 0
    weights = [load_file(it / "model.safetensors") for it in (stories_folder, tmp_path / "hf")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    prompts = ["Once upon a time", "Lily and the dog"]
    arguments = [it for prompt in prompts for it in ("--prompt", prompt)]
    if tokenizer_file == "tokenizer.model":
        arguments += ["--tokenizer", str(tmp_path / "hf" / tokenizer_file)]
    outcome = run_cli("generate", str(tmp_path / "hf"), *arguments, "--max-completion-tokens", "40")
    assert (outcome.code, outcome.err) == (0, "")
    tokenizer, model = load_tokenizer(stories_folder), reference_model(stories_folder)
    expected = ""
    for prompt in prompts:
        ids = torch.tensor([tokenizer.encode(prompt)])
        mask = torch.ones_like(ids)
        done = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=40, pad_token_id=0
        )
        expected += f"{tokenizer.decode(done[0].tolist())}\n\n"
    assert outcome.out == expected


def test_generate_samples_by_its_seed(model_folder: Callable[[str], Path], run_cli: Cli):
    def text(*options: str) -> str:
        outcome = run_cli("generate", str(model_folder("mha")), "--prompt", "the cat", *options)
        assert (outcome.code, outcome.err) == (0, "")
        return outcome.out

    sampled = ("--temperature", "1.0", "--max-completion-tokens", "12")
    assert text(*sampled) == text(*sampled, "--seed", "0") != text(*sampled, "--seed", "1")
    assert text(*sampled, "--top-k", "1") == text("--max-completion-tokens", "12") != text(*sampled)
    whole = text(*sampled).removeprefix("the cat").removesuffix("\n\n")
    stop = whole[3]
    stopped = text(*sampled, "--stop", stop).removeprefix("the cat").removesuffix("\n\n")
    # The token that completes it stays whole.
    assert whole.startswith(stopped) and stop in stopped and len(stopped) < len(whole)


def test_generate_stops_where_the_model_has_no_more_positions(
    model_folder: Callable[[str], Path], run_cli: Cli
):
    outcome = run_cli("generate", str(model_folder("mha")), "--prompt", "a" * 126)
    assert outcome.code == 0 and outcome.out.startswith("a" * 126)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nowhere", "--prompt", "x"], "no folder nowhere"),
        (["{model}", "--prompt", ""], "prompt 1 has 0 tokens; the model takes 1 to 127"),
        (
            ["{model}", "--prompt", "x", "--prompt", "b" * 128],
            "prompt 2 has 128 tokens; the model takes 1 to 127",
        ),
        (
            ["{model}", "--prompt", "x", "--tokenizer", "nowhere"],
            "tokenizer nowhere: no such folder or file",
        ),
        (
            ["{model}", "--prompt", "x", "--top-p", "0"],
            "--top-p must be in (0, 1], --top-k not negative",
        ),
        (
            ["{model}", "--prompt", "x", "--temperature", "nan"],
            "--temperature is nan; needs a number from 0",
        ),
    ],
)
def test_generate_refuses_bad_input(
    model_folder: Callable[[str], Path], run_cli: Cli, arguments: list[str], line: str
):
    model = str(model_folder("mha"))
    outcome = run_cli("generate", *(it.replace("{model}", model) for it in arguments))
    assert (outcome.code, outcome.out, outcome.err) == (2, "", f"gdpo-megatron: {line}\n")


def test_generate_takes_no_config_keys(model_folder: Callable[[str], Path], run_cli: Cli):
    outcome = run_cli(
        *("generate", str(model_folder("mha")), "--prompt", "x", "--rollout.top_k", "3")
    )
    assert outcome.code == 2 and "unknown arguments: --rollout.top_k 3" in outcome.err
