"""`gdpo-megatron certify`: the first minutes on a machine, every check for real.

Exit codes: 0 all that could run has passed, 1 something failed, 2 bad input.
"""

from __future__ import annotations

import argparse
import datetime
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from gdpo_megatron.certify.certificate import (
    make_certificate,
    result_lines,
    summary_lines,
    write_certificate,
)
from gdpo_megatron.certify.check import (
    Check,
    CheckFailed,
    Outcome,
    Situation,
    Status,
    judge,
)
from gdpo_megatron.certify.checks import choose
from gdpo_megatron.certify.job import Job
from gdpo_megatron.errors import InputError
from gdpo_megatron.observability.progress import ProgressDisplay
from gdpo_megatron.platform import detect_platform, machine


def run_certify(options: argparse.Namespace) -> int:
    """Run the checks, show and write the certificate; returns the exit code."""
    checks = choose(options.only)
    if options.time_limit is not None:
        checks = [replace(check, seconds=float(options.time_limit)) for check in checks]
    situation = read_situation(options)
    folder = _output_folder(options.output)
    display = ProgressDisplay(len(checks), 0, "gdpo-megatron certify", unit="check")
    outcomes: list[Outcome] = []
    with display:
        for number, check in enumerate(checks, 1):
            display.message(f"[{number}/{len(checks)}] {check.name}: {check.proves}")
            display.phase(check.name)
            outcome = run_check(check, situation, folder / check.name)
            outcomes.append(outcome)
            for line in result_lines(outcome):
                display.message(line)
            display.step_done(number, {})
    certificate = make_certificate(situation, outcomes)
    for path in filter(None, (folder / "certificate.json", options.json)):
        write_certificate(path, certificate)
    print("", *summary_lines(certificate), f"certificate and logs: {folder}", sep="\n")
    return int(any(it.status is Status.FAIL for it in outcomes))


def run_check(check: Check, situation: Situation, folder: Path) -> Outcome:
    """Run one check; whatever it does, this returns.

    Args:
        check: of the table.
        situation: what it is run with.
        folder: of its own; made.
    """
    began = time.monotonic()

    def ended(status: Status, reason: str) -> Outcome:
        seconds = time.monotonic() - began
        return Outcome(
            check=check.name, proves=check.proves, status=status, seconds=seconds, reason=reason
        )

    try:
        missing = check.missing(situation)
        if missing is not None:
            return ended(Status.CANNOT_RUN, missing)
        folder.mkdir()
        findings = check.run(Job(folder, situation, check.seconds))
        return judge(check, findings, time.monotonic() - began)
    except CheckFailed as failed:
        return ended(Status.FAIL, str(failed))
    except Exception as error:  # the check itself is wrong, which is a failure as well
        with (folder if folder.is_dir() else folder.parent).joinpath("log.txt").open("a") as log:
            traceback.print_exc(file=log)
        return ended(Status.FAIL, f"the check broke: {error!r}")


def read_situation(options: argparse.Namespace) -> Situation:
    """What the options say, held against this machine.

    Raises:
        InputError: it has not so many GPUs, or a path is wrong.
    """
    problems: list[str] = []
    platform, there = detect_platform(), len(machine.gather().gpus)
    if options.gpus is not None and options.gpus > there:
        problems.append(
            f"--gpus {options.gpus}: torch sees {there} here; "
            + (f"give at most {there}" if there else "--processes N runs on the CPU")
        )
    if options.processes is not None and there:
        problems.append(
            f"--processes {options.processes}: is for a machine without a GPU, and torch sees "
            f"{there} here; give --gpus N"
        )
    if options.model is not None and not (options.model / "config.json").is_file():
        problems.append(f"--model {options.model}: no folder with a config.json")
    if options.data is not None and not options.data.is_file():
        problems.append(f"--data {options.data}: no such file")
    if options.json is not None and not options.json.resolve().parent.is_dir():
        problems.append(f"--json {options.json}: no folder {options.json.parent}")
    if problems:
        raise InputError(problems)
    num_devices: Any = options.gpus or options.processes  # the parser asks for one of them
    return Situation(
        platform=platform,
        num_devices=num_devices,
        model=options.model,
        data=options.data,
    )


def _output_folder(given: Path | None) -> Path:
    now = datetime.datetime.now().strftime("%Y%m%d_%H%M%S")
    folder = (given or Path("runs", f"certify_{now}")).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--output {folder}: exists and is not empty; give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
