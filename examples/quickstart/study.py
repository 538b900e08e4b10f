"""GDPO, GRPO and a control over several seeds, all from the quickstart's warm start.

Needs the folder of a finished quickstart. A seed changes the order of the prompts and the sampling
noise. Prints held-out rewards as mean and standard error over seeds, and the format reward by step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
METHODS = {
    "GDPO": [],
    "GRPO": ["--advantage.estimator", "grpo"],
    "GRPO without std": ["--advantage.estimator", "grpo_no_std"],
    "control (shuffled advantages)": ["--advantage.estimator", "./shuffled.py:shuffled_gdpo"],
}
REWARDS = ("format", "correctness")
STEPS_SHOWN = (1, 5, 10, 15, 20, 40)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", default="runs/quickstart", help="folder of a finished quickstart")
    parser.add_argument("--seeds", type=int, default=5, help="seeds per method (5)")
    parser.add_argument("--steps", type=int, default=40, help="steps of each run (40)")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, one rank each (2)")
    options = parser.parse_args()
    out = Path(options.out).resolve()
    if not (out / "sft" / "hf").is_dir():
        sys.exit(f"{out} holds no warm start; run the quickstart first")
    jobs = [(m, s) for s in range(1, options.seeds + 1) for m in METHODS]
    with ThreadPoolExecutor(options.parallel) as pool:
        list(pool.map(lambda job: run(out, job[0], job[1], options.steps), jobs))
    report(out, options.seeds, options.steps)


def run_dir(out: Path, method: str, seed: int) -> Path:
    """Folder of one run."""
    return out / "study" / f"{method.split(' (')[0].replace(' ', '_').lower()}_{seed}"


def run(out: Path, method: str, seed: int, steps: int) -> None:
    """Train one method with one seed; a finished run is not repeated."""
    folder = run_dir(out, method, seed)
    if (folder / "metrics.jsonl").is_file() and len(metrics(folder)) >= steps:
        return
    command = [sys.executable, "-m", "gdpo_megatron.cli", "train", str(HERE / "gdpo.yaml")]
    settings = {
        "run_dir": folder,
        "model.hf_path": out / "sft" / "hf",
        "data.train": out / "data" / "train.jsonl",
        "data.eval": out / "data" / "eval.jsonl",
        "seed": seed,
        "train.num_steps": steps,
        "train.eval_interval": steps,
        "checkpoint.export_hf": "false",
    }
    command += [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    log = folder.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        code = subprocess.call([*command, *METHODS[method]], stdout=file, stderr=file)
    print(f"{method}, seed {seed}: {'done' if code == 0 else f'failed, see {log}'}", flush=True)
    if code:
        sys.exit(code)


def metrics(folder: Path) -> list[dict[str, float]]:
    """Logged metrics of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def report(out: Path, seeds: int, steps: int) -> None:
    """Print both tables as Markdown."""
    before = json.loads((out / "before" / "eval.json").read_text())["means"]
    shown = [step for step in STEPS_SHOWN if step <= steps]
    print(f"\n| {seeds} seeds | held-out format | held-out correctness |\n|---|---|---|")
    print(f"| before | {before['format']:.3f} | {before['correctness']:.3f} |")
    curves: list[str] = []
    for method in METHODS:
        logs = [metrics(run_dir(out, method, seed)) for seed in range(1, seeds + 1)]
        cells: list[str] = []
        for reward in REWARDS:
            values = [log[steps - 1][f"eval/{reward}/mean"] for log in logs]
            error = statistics.stdev(values) / len(values) ** 0.5
            rise = statistics.mean(values) - before[reward]
            cells.append(
                f"{statistics.mean(values):.3f} \u00b1 {error:.3f} ({rise / error:+.1f} s.e.)"
            )
        print(f"| {method} | {' | '.join(cells)} |")
        means = [
            statistics.mean(log[step - 1]["reward/format/mean"] for log in logs) for step in shown
        ]
        curves.append(f"| {method} | {' | '.join(f'{mean:.2f}' for mean in means)} |")
    print(f"\n| format in training, step | {' | '.join(map(str, shown))} |")
    print("|---" * (len(shown) + 1) + "|")
    print("\n".join(curves))


if __name__ == "__main__":
    main()
