"""One of the paper's tasks on a laptop: its real data and rewards, a model of a million parameters.

    python examples/cpu/run.py tool_calling|gsm8k|math|code|mixed [--steps 5] [--section.key value]

Prepares the data, trains a tokenizer on it, warm-starts a model that is drawn at random, trains it
by the task's cpu.yaml, which is the paper's config with another model and small batches, and prints
the rewards of each step. Every stage is a command, printed before it runs; one that is done is not
repeated. Data is looked for in $GDPO_ASSETS/data (docs/tasks.md says what belongs there).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from warm_start import WARM_STARTS

from gdpo_megatron.config.loader import load_config
from gdpo_megatron.config.schema import RLConfig

EXAMPLES = Path(__file__).resolve().parents[1]
ROOT = EXAMPLES.parent

MATH_PROMPT = "{prompt}\nLet's think step by step and put the final answer in \\boxed{{}}."
CODE_PROMPT = (
    "{prompt}\nWrite a Python program that reads standard input and writes standard output, as one "
    "block that begins with ```python."
)


@dataclass(frozen=True)
class Source:
    """A file of the assets: its format and how `data prepare` is told to read it."""

    task: str
    format: str
    file: str
    options: tuple[str, ...] = ()


TOOLRL = Source("tool_calling", "toolrl", "toolrl/train.jsonl")
GSM8K = Source("gsm8k", "gsm8k", "gsm8k/train.jsonl", ("--limit", "1000"))
MATH = Source(
    "math",
    "math",
    "math/train.jsonl",
    ("--limit", "1000", "--prompt-template", MATH_PROMPT, "--chat"),
)
FEW_MATH = replace(MATH, options=("--limit", "200", *MATH.options[2:]))
CODE = Source(
    "code",
    "code",
    "code_contests_small/train.jsonl",
    ("--prompt-template", CODE_PROMPT, "--chat"),
)
TASKS: dict[str, tuple[Source, ...]] = {
    "tool_calling": (TOOLRL,),
    "gsm8k": (GSM8K,),
    "math": (MATH,),
    "code": (CODE,),
    "mixed": (TOOLRL, FEW_MATH),
}
"""Task -> what it is trained on."""

ROW_REWARDS = {"tool_calling": "format,calls", "math": "correctness,length"}
"""In a mixed set: the rewards that apply to the rows of a source."""


def main() -> None:
    """Command line."""
    options, overrides = _options()
    began = time.monotonic()
    run = Run(options, overrides)
    run.prepare()
    run.make_model()
    if options.sft_steps:
        run.warm_start()
    run.train()
    print_rewards(run.folder / options.estimator / "metrics.jsonl")
    print(f"{time.monotonic() - began:.0f} s in all")


def _options() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", maxsplit=1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="Other words, --section.key value, are handed to `gdpo-megatron train`.",
        allow_abbrev=False,
    )
    parser.add_argument("task", choices=TASKS, help="which one")
    parser.add_argument("--steps", type=int, default=5, help="steps of GDPO")
    parser.add_argument("--sft-steps", type=int, default=100, help="of the warm start; 0: none")
    parser.add_argument("--vocab-size", type=int, default=3000, help="tokens, at most")
    parser.add_argument("--nproc", type=int, default=2, help="ranks")
    parser.add_argument("--estimator", default="gdpo", help="gdpo, grpo, grpo_no_std")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "cpu", help="folder")
    assets = os.environ.get("GDPO_ASSETS", str(ROOT.parent / "shared"))
    parser.add_argument("--assets", type=Path, default=Path(assets), help="folder that holds data")
    options, overrides = parser.parse_known_args()
    for source in TASKS[options.task]:
        if not (options.assets / "data" / source.file).is_file():
            parser.error(f"no file {options.assets / 'data' / source.file}; set GDPO_ASSETS")
    return options, overrides


class Run:
    """The stages of one task.

    Args:
        options: the command line's.
        overrides: its words for `train`.
    """

    def __init__(self, options: argparse.Namespace, overrides: Sequence[str]):
        self._options, self._overrides = options, overrides
        self._sources = TASKS[options.task]
        self.folder: Path = options.out.resolve() / options.task
        self._config_file = EXAMPLES / options.task / "cpu.yaml"
        self._config = load_config(RLConfig, self._config_file)
        self._train = self.folder / "train.jsonl"
        self._model = self.folder / "model"

    def prepare(self) -> None:
        """Write train.jsonl in the documented schema."""
        parts = [self.folder / f"{it.task}.jsonl" for it in self._sources]
        for source, part in zip(self._sources, parts, strict=True):
            if part.is_file():
                continue
            file = self._options.assets / "data" / source.file
            words = [source.format, file, "--output", part, *source.options]
            if len(self._sources) > 1:
                words += ["--rewards", ROW_REWARDS[source.task]]
            self._cli("data", "prepare", *words)
        self._train.write_bytes(b"".join(part.read_bytes() for part in parts))

    def make_model(self) -> None:
        """Write config and tokenizer of the model, and the rows of the warm start."""
        warm_start = self.folder / "sft.jsonl"
        rows: list[dict[str, Any]] = []
        for source in self._sources:
            prepared = (self.folder / f"{source.task}.jsonl").read_text("utf-8").splitlines()
            for number, line in enumerate(prepared):
                row = json.loads(line)
                completion = WARM_STARTS[source.task](row, number)
                if completion is not None:
                    rows.append({"prompt": row["prompt"], "completion": completion})
        warm_start.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        if (self._model / "config.json").is_file():
            return
        words = ["--text-from", self._train, warm_start, "--output", self._model]
        words += ["--vocab-size", self._options.vocab_size]
        self._run([sys.executable, ROOT / "tools" / "make_tiny_model.py", *words])

    def warm_start(self) -> None:
        """Teach the form of the answers."""
        settings = {
            "run_dir": self.folder / "sft",
            "model.hf_path": self._model,
            "data.train": self.folder / "sft.jsonl",
            "train.num_steps": self._options.sft_steps,
        }
        system_prompt = self._config.data.system_prompt
        if system_prompt is not None:  # the model is to see what it will be asked
            settings["data.system_prompt"] = system_prompt
        self._job("sft", EXAMPLES / "cpu" / "sft.yaml", settings, ())

    def train(self) -> None:
        """GDPO by the task's config."""
        settings: dict[str, Any] = {
            "run_dir": self.folder / self._options.estimator,
            "model.hf_path": self.folder / "sft" / "hf",
            "data.train": self._train,
            "train.num_steps": self._options.steps,
            "advantage.estimator": self._options.estimator,
        }
        if not self._options.sft_steps:
            settings |= {"model.hf_path": self._model, "model.init": "random"}
        self._job("train", self._config_file, settings, self._overrides)

    def _job(
        self, job: str, config: Path, settings: dict[str, Any], overrides: Sequence[str]
    ) -> None:
        words = [word for key, value in settings.items() for word in (f"--{key}", value)]
        self._cli(job, config, "--nproc", self._options.nproc, *words, *overrides)

    def _cli(self, *words: Any) -> None:
        self._run([sys.executable, "-m", "gdpo_megatron.cli", *words])

    def _run(self, words: Sequence[Any]) -> None:
        """Run a command; its failure ends this one with its exit code."""
        command = [str(word) for word in words]
        shown = ["gdpo-megatron", *command[3:]] if "gdpo_megatron.cli" in command else command
        print(f"$ {shlex.join(shown)}", flush=True)
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


def print_rewards(path: Path) -> None:
    """Print the mean of each reward in each step's rollouts, and what came of them."""
    steps = [json.loads(line) for line in path.read_text().splitlines()]
    pattern = re.compile("reward/([^/]+)/mean")
    names = [found[1] for key in steps[-1] if (found := pattern.fullmatch(key))]
    print("| step | " + " | ".join([*names, "tokens", "seconds"]) + " |")
    print("|---:|" + "---:|" * (len(names) + 2))
    for step in steps:
        means = [step[f"reward/{name}/mean"] for name in names]
        # None: no row of the step is one that the reward applies to.
        values = ["-" if mean is None else f"{mean:.3f}" for mean in means]
        values += [f"{step['completion/mean_tokens']:.1f}", f"{step['time/step_seconds']:.1f}"]
        print(f"| {step['step']} | " + " | ".join(values) + " |")


if __name__ == "__main__":
    main()
