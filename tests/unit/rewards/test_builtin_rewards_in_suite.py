"""Built-in rewards that start processes or ask a server, in the worker processes of a suite.

Conditioned length (paper eq. 8) is here because its condition is the math reward. Not covered: the
advantage stage behind it.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
import suite_rewards
from suite_helpers import mine, reward, rollout, suite, wait_until
from suite_rewards import TOWER

from gdpo_megatron.config.reward import GateConfig

NAN = math.nan


_elsewhere: set[int] = set()


@pytest.fixture(autouse=True)
def _those_of_other_tests() -> None:
    """Answers that were checked in this process before have left it a verifier."""
    _elsewhere.clear()
    _elsewhere.update(verifiers())


def verifiers() -> list[int]:
    everybodys = suite_rewards.verifiers(os.getpid())
    return [process.pid for process in everybodys if process.pid not in _elsewhere]


def test_conditioned_length_of_the_paper():
    """1 iff length <= l and the answer is right; l = 4, inclusive."""
    rewards = [
        mine("correct", "math_in_time", args={"on_timeout": "missing"}),
        reward("short", "length", args={"limit": 4}),
        reward(
            "right_and_short",
            "length",
            args={"limit": 4},
            when=GateConfig(reward="correct", gte=1.0),
        ),
    ]
    # Final answer to 1/2, tokens, how it ended; correct, short, both.
    rows = [
        (r"\boxed{0.5}", 4, "stop", [1.0, 1.0, 1.0]),
        (r"\boxed{0.5}", 5, "stop", [1.0, 0.0, 0.0]),
        (r"\boxed{0.5}", 4, "length", [1.0, 0.0, 0.0]),  # cut: it would have gone on
        (r"\boxed{0.6}", 1, "stop", [0.0, 1.0, 0.0]),
        (r"\boxed{0.6}", 9, "stop", [0.0, 0.0, 0.0]),
        ("no idea", 1, "stop", [0.0, 1.0, 0.0]),
        (rf"\boxed{{{TOWER}}}", 1, "stop", [NAN, 1.0, NAN]),
        (r"\boxed{\frac{2}{4}}", 1, "stop", [1.0, 1.0, 1.0]),  # after the one that was cut off
    ]
    with suite(*rewards, group_size=8, num_workers=1) as running:
        for sample_id, (text, num_tokens, finish_reason, _) in enumerate(rows):
            running.submit(
                rollout(
                    sample_id,
                    text,
                    group_size=8,
                    answer=r"\frac{1}{2}",
                    num_tokens=num_tokens,
                    finish_reason=finish_reason,
                )
            )
        scores = running.collect()
        assert len(verifiers()) == 1  # one for the one worker
    expected = [values for *_, values in rows]
    for row, values in enumerate(expected):
        assert scores.values[row].tolist() == pytest.approx(values, abs=0, nan_ok=True), row
    # Ungated, the last column is the second.
    assert scores.raw[:, 2].tolist() == scores.raw[:, 1].tolist() == [row[1] for row in expected]
    assert scores.reasons == {
        (6, "correct"): "verifier timeout",
        (6, "right_and_short"): "condition missing: 'correct': verifier timeout",
    }
    assert scores.report.events["correct"] == {"no_answer": 1, "timeout": 1}
    assert scores.report.num_restarts == 0
    wait_until(lambda: not verifiers(), "a verifier is left behind")


def test_an_overrun_within_the_suites_time_is_zero_and_no_fault():
    rewards = [mine("correct", "math_in_time")]
    with suite(*rewards, num_workers=1) as running:
        for sample_id, text in enumerate([rf"\boxed{{{TOWER}}}", r"\boxed{0.5}"]):
            running.submit(rollout(sample_id, text, answer=r"\frac{1}{2}"))
        scores = running.collect()
    assert scores.values.tolist() == [[0.0], [1.0]]
    assert scores.report.events["correct"] == {"timeout": 1}


def test_a_killed_reward_worker_takes_its_verifier_along(told: None):
    with suite(mine("correct", "math_that_hangs"), num_workers=1) as running:
        for sample_id, text in enumerate([rf"\boxed{{{TOWER}}}", r"\boxed{0.5}"]):
            running.submit(rollout(sample_id, text, answer=r"\frac{1}{2}"))
        scores = running.collect()
        assert scores.values[1].tolist() == [1.0]
        assert scores.reasons[0, "correct"].startswith("sample timeout")
        wait_until(lambda: len(verifiers()) == 1, "that of the killed worker is left")


@pytest.fixture
def address() -> Iterator[str]:
    """A server that scores a sample by the length of its completion."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            scores = [len(sample["completion"]) for sample in body["samples"]]
            content = json.dumps({"scores": scores}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def test_a_reward_model_judges_groups(address: str):
    rewards = [
        reward(
            "model", "reward_model", args={"url": address, "timeout": 600, "request_timeout": 300}
        ),
        reward("gone", "reward_model", args={"url": "http://127.0.0.1:9/", "num_retries": 0}),
    ]
    with suite(*rewards) as running:
        for sample_id, text in enumerate(["a", "bb", "ccc", "dddd"]):
            running.submit(rollout(sample_id, text))
        scores = running.collect()
    assert scores.values[:, 0].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert not scores.valid[:, 1].any()
    assert scores.report.num_invalid["gone"] == {"server unreachable": 4}
