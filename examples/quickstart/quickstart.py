"""GDPO against GRPO on a small tool-calling task, from nothing to a Hugging Face model.

Makes a data set and a tokenizer, warm-starts a model of 1 M parameters, trains it with GDPO and,
from the same start, with GRPO, evaluates on held-out prompts, prints a table, draws the reward
curves, exports the GDPO model and checks that transformers gives the same answer with it. Every
stage is a `gdpo-megatron` command, printed before it runs. A stage that is done is not repeated:
after Ctrl-C the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
METHODS = {"GDPO": "gdpo", "GRPO": "grpo"}
REWARDS = ("format", "correctness")


def main() -> None:
    options = _options()
    out = Path(options.out).resolve()
    began = time.monotonic()
    runner = Runner(options, total=8)
    with runner.stage("data set and tokenizer"):
        if not (out / "data" / "model" / "config.json").is_file():
            make_data = [sys.executable, str(HERE / "make_data.py"), str(out / "data")]
            runner.run([*make_data, "--seed", str(options.seed)])
    with runner.stage("warm start by SFT"):
        runner.job(
            "sft", "sft", out, {"data.train": "data/sft.jsonl", "model.hf_path": "data/model"}
        )
    start = out / "sft" / "hf"
    results = {"before": _evaluate(runner, "held-out rewards before", out, start, "before")}
    for label, name in METHODS.items():
        with runner.stage(f"{label}"):
            extra = {} if options.steps is None else {"train.num_steps": options.steps}
            runner.job("train", name, out, _data(start) | extra)
    for label, name in METHODS.items():
        title = f"held-out rewards after {label}"
        results[label] = _evaluate(runner, title, out, out / name / "hf", f"{name}_eval")
    with runner.stage("transformers loads the export"):
        same = _compare_with_transformers(out / "gdpo" / "hf", out / "data" / "eval.jsonl")
    logs = {label: _metrics(out / name) for label, name in METHODS.items()}
    print_table(results, logs)
    plot = draw_curves(logs, out / "rewards.png")
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"curves of each reward: {plot}\nGDPO model:            {out / 'gdpo' / 'hf'}")
    print(f"{time.monotonic() - began:.0f} s in all")
    if not same:
        sys.exit("transformers gives another answer than the trained policy")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", default="runs/quickstart", help="folder (runs/quickstart)")
    parser.add_argument("--nproc", type=int, default=2, help="ranks (2)")
    parser.add_argument("--tp", type=int, default=1, help="tensor parallel size (1)")
    parser.add_argument("--pp", type=int, default=1, help="pipeline parallel size (1)")
    parser.add_argument("--steps", type=int, help="GDPO and GRPO steps (40)")
    parser.add_argument("--sft-steps", type=int, help="steps of the warm start (400)")
    parser.add_argument("--seed", type=int, default=1234, help="of data, weights and sampling")
    return parser.parse_args()


class Runner:
    """Runs the stages one after the other and says which one it is."""

    def __init__(self, options: argparse.Namespace, total: int):
        self._options, self._total, self._index = options, total, 0

    def stage(self, title: str) -> Runner:
        """Announce the next stage."""
        self._index += 1
        self._began = time.monotonic()
        print(f"\n[{self._index}/{self._total}] {title}", flush=True)
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            print(f"      {time.monotonic() - self._began:.1f} s", flush=True)

    def run(self, command: Sequence[str]) -> None:
        """Run a command; its failure ends the quickstart with its exit code."""
        shown = ["gdpo-megatron", *command[3:]] if "gdpo_megatron.cli" in command else command
        print(f"      $ {shlex.join(shown)}", flush=True)
        # An interrupt reaches the child too: wait for it to save instead of leaving it behind.
        process = subprocess.Popen(command)
        while True:
            try:
                code = process.wait()
                break
            except KeyboardInterrupt:
                continue
        if code:
            sys.exit(code)

    def job(self, job: str, name: str, out: Path, settings: dict[str, Any]) -> None:
        """Run a gdpo-megatron job with its config file and what this run sets."""
        options = self._options
        settings = {"run_dir": name, **settings}
        if job == "sft" and options.sft_steps is not None:
            settings["train.num_steps"] = options.sft_steps
        paths = ("run_dir", "model.hf_path", "data.train", "data.eval")
        settings = {k: str(out / v) if k in paths else v for k, v in settings.items()}
        settings |= {
            "seed": options.seed,
            "parallel.tensor_model_parallel_size": options.tp,
            "parallel.pipeline_model_parallel_size": options.pp,
        }
        config = HERE / f"{'gdpo' if job == 'eval' else name}.yaml"
        command = [sys.executable, "-m", "gdpo_megatron.cli", job, str(config)]
        command += ["--nproc", str(options.nproc)]
        for key, value in settings.items():
            command += [f"--{key}", str(value)]
        self.run(command)


def _data(model: Path) -> dict[str, str]:
    return {
        "model.hf_path": str(model),
        "data.train": "data/train.jsonl",
        "data.eval": "data/eval.jsonl",
    }


def _evaluate(runner: Runner, title: str, out: Path, model: Path, name: str) -> dict[str, Any]:
    with runner.stage(title):
        path = out / name / "eval.json"
        if not path.is_file():
            runner.job("eval", name, out, _data(model))
    return json.loads(path.read_text())


def _metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def print_table(
    results: dict[str, dict[str, Any]], logs: dict[str, list[dict[str, float]]]
) -> None:
    """Print held-out rewards before and after, with standard errors over prompts."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="\nHeld-out prompts, temperature 1, mean and standard error")
    table.title_justify = "left"
    table.add_column("")
    for column in (*REWARDS, "tokens", "distinct advantages*"):
        table.add_column(column, justify="right", no_wrap=True)
    for label, result in results.items():
        cells = [
            f"{result['means'][r]:.3f} \u00b1 {result['standard_errors'][r]:.3f}" for r in REWARDS
        ]
        steps = [m["advantage/distinct_values"] for m in logs.get(label, [])]
        distinct = f"{steps[0]:.0f} / {sum(steps) / len(steps):.1f}" if steps else ""
        table.add_row(
            "SFT" if label == "before" else label, *cells, f"{result['mean_tokens']:.1f}", distinct
        )
    Console().print(table)
    print("* in step 1, whose rollouts are the same for both / mean over the steps")


def draw_curves(logs: dict[str, list[dict[str, float]]], path: Path) -> Path:
    """Draw each reward over the steps, one line per method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(REWARDS), figsize=(9, 3.4), layout="constrained")
    for axis, reward in zip(axes, REWARDS, strict=True):
        for label, color in zip(logs, ("#1f6feb", "#d1742f"), strict=True):
            steps = [m["step"] for m in logs[label]]
            values = [m[f"reward/{reward}/mean"] for m in logs[label]]
            axis.plot(steps, values, label=label, color=color, linewidth=1.8)
        axis.set(title=f"{reward} reward", xlabel="step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=130)
    return path


def _compare_with_transformers(folder: Path, data: Path) -> bool:
    """Print the greedy answer of both; returns whether they are the same."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from gdpo_megatron.generate import generate_texts
    from gdpo_megatron.rollout.base import SamplingParams

    logging.disable_progress_bar()
    prompt = json.loads(data.read_text().splitlines()[0])["prompt"]
    sampling = SamplingParams(
        temperature=0.0, top_p=1.0, top_k=0, max_completion_tokens=48, stop=(), stop_token_ids=()
    )
    (ours,) = generate_texts(folder, [prompt], sampling, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([tokenizer.encode(prompt)])
    with torch.no_grad():
        output = model.generate(ids, do_sample=False, max_new_tokens=48)
    theirs = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    print(f"\n{prompt}{ours}\n")
    print(f"      transformers gives {'the same answer' if ours == theirs else repr(theirs)}")
    return ours == theirs


if __name__ == "__main__":
    main()
