"""A small model learns to call a calculator, from nothing, on a laptop.

Makes data and a tokenizer, warm-starts a model of half a million parameters on transcripts of which
most are bad, and trains it with GDPO and the environment `tools`; with --control, once more with
advantages dealt out to the wrong rollouts. Evaluates on held-out questions before and after, shows
a conversation and draws the curves. Every stage is a `gdpo-megatron` command, printed before it
runs. A stage that is done is not repeated.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LABELS = {"gdpo": "GDPO", "shuffled": "control"}
PANELS = {
    "reward/correct/mean": "correct answers",
    "reward/used_tool/mean": "used the tool without an error",
    "environment/mean_turns": "turns of the model",
}


def main() -> None:
    """Command line."""
    options = _options()
    out, began = options.out.resolve(), time.monotonic()
    run = Run(options, out)
    if not (out / "data" / "model" / "config.json").is_file():
        run.command([sys.executable, HERE / "make_data.py", out / "data", "--seed", options.seed])
    run.job("sft", "sft", {"model.hf_path": "data/model", "data.train": "data/sft.jsonl"})
    found = {"warm start": run.evaluate("sft")}
    names = ["gdpo", "shuffled"] if options.control else ["gdpo"]
    for name in names:
        run.job("train", name, run.data("sft"))
        found[LABELS[name]] = run.evaluate(name)
    logs = {name: _read(out / name / "metrics.jsonl") for name in names}
    show_conversation(out / "gdpo" / "rollouts")
    print_table(found)
    print(f"curves: {draw_curves(logs, out / 'rewards.png')}")
    print(f"model:  {out / 'gdpo' / 'hf'}")
    print(f"{time.monotonic() - began:.0f} s in all")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", maxsplit=1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/calculator"), help="folder")
    parser.add_argument("--nproc", type=int, default=2, help="ranks")
    parser.add_argument("--control", action="store_true", help="train the control as well")
    parser.add_argument("--steps", type=int, help="of GDPO; default the config's")
    parser.add_argument("--sft-steps", type=int, help="of the warm start; default the config's")
    parser.add_argument("--seed", type=int, default=1234, help="of data, weights and sampling")
    return parser.parse_args()


class Run:
    """Runs the stages.

    Args:
        options: the command line's.
        out: folder of all that is written.
    """

    def __init__(self, options: argparse.Namespace, out: Path):
        self._options, self._out = options, out

    def command(self, words: Sequence[Any]) -> None:
        """Run a command; its failure ends the example with its exit code."""
        words = [str(word) for word in words]
        cli = "gdpo_megatron.cli" in words
        print(f"\n$ {shlex.join(['gdpo-megatron', *words[3:]] if cli else words)}", flush=True)
        process = subprocess.Popen(words)
        while True:
            try:
                code = process.wait()
                break
            except KeyboardInterrupt:  # the command has it too: let it save what it has
                continue
        if code:
            sys.exit(code)

    def job(self, job: str, name: str, settings: Mapping[str, Any]) -> None:
        """Run a job with the config of that name, and files below the output folder."""
        options = self._options
        config = HERE / f"{'gdpo' if job == 'eval' else name}.yaml"
        words = [sys.executable, "-m", "gdpo_megatron.cli", job, config, "--nproc", options.nproc]
        paths = {"run_dir": name, **settings}
        words += [word for key, value in paths.items() for word in (f"--{key}", self._out / value)]
        steps = options.sft_steps if job == "sft" else options.steps
        if steps is not None and job != "eval":
            words += ["--train.num_steps", steps]
        self.command([*words, "--seed", options.seed])

    def data(self, start: str) -> dict[str, str]:
        """Settings of a run that starts from that one's model."""
        return {
            "model.hf_path": f"{start}/hf",
            "data.train": "data/train.jsonl",
            "data.eval": "data/eval.jsonl",
        }

    def evaluate(self, name: str) -> dict[str, Any]:
        """Held-out results of a run's model: quantity -> its estimate."""
        path = self._out / name / "eval" / "hf" / "results.json"
        if not path.is_file():
            self.job("eval", name, self.data(name))
        (found,) = json.loads(path.read_text())["sets"].values()
        return found["quantities"]


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def show_conversation(folder: Path) -> None:
    """Print the first rollout of the last step that was logged."""
    rollout = _read(max(folder.iterdir()))[0]
    print(f"\nstep {rollout['step']}, {rollout['prompt_id']}, rewards {rollout['rewards']}")
    print(rollout["prompt"], end="")
    for turn in rollout["turns"]:
        print(turn["text"])
        if turn["observation"]:
            print(turn["observation"])


def print_table(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Print held-out rewards with standard errors over questions."""
    print(f"\n{'held-out questions, temperature 1':36}{'correct':>18}{'used the tool':>18}")
    for label, quantities in found.items():
        cells = (
            f"{it['mean']:.3f} +- {it['standard_error']:.3f}"
            for it in (quantities["reward/correct"], quantities["reward/used_tool"])
        )
        print(f"{label:36}" + "".join(f"{cell:>18}" for cell in cells))


def draw_curves(logs: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> Path:
    """Draw rewards and turns over the steps, one line per run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(PANELS), figsize=(11, 3.2), layout="constrained")
    colors = {"gdpo": "#1f6feb", "shuffled": "#8c959f"}
    for axis, (metric, title) in zip(axes, PANELS.items(), strict=True):
        for name, steps in logs.items():
            x, y = [it["step"] for it in steps], [it[metric] for it in steps]
            axis.plot(x, y, label=LABELS[name], color=colors[name], linewidth=1.8)
        axis.set(title=title, xlabel="step")
        axis.set_ylim(0, 1.02 if metric.startswith("reward") else 3)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=130)
    return path


if __name__ == "__main__":
    main()
