r"""The math reward: where the answer is, what equals what, and that nothing hangs or outlives us.

Not covered: how good math-verify is beyond the pairs below, and machines without procfs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from suite_helpers import is_running, wait_until

from gdpo_megatron.rewards import NOT_APPLICABLE, Invalid, RewardSample
from gdpo_megatron.rewards.base import collect_events
from gdpo_megatron.rewards.builtin import math, math_verifier
from gdpo_megatron.rewards.builtin.math_verifier import MathVerifier, VerifierError

HOSTILE = [
    r"9^{9^{9^{9}}}",
    r"\binom{10^{9}}{5 \cdot 10^{8}}",
    r"100000000!",
]


@pytest.fixture(autouse=True)
def _no_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a limit that a test sets is for something to reach."""
    compare = MathVerifier.compare

    def compare_patiently(self: MathVerifier, gold: str, answer: str, timeout: float) -> Any:
        return compare(self, gold, answer, 600.0 if timeout == math.DEFAULT_TIMEOUT else timeout)

    monkeypatch.setattr(MathVerifier, "compare", compare_patiently)
    monkeypatch.setattr(math_verifier, "START_SECONDS", 600.0)


@pytest.fixture
def no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking a worker is an error."""
    monkeypatch.setattr(math, "shared_verifier", None)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Replaces the worker's script by one with this loop body; yields a verifier that uses it."""
    verifiers: list[MathVerifier] = []

    def replace(body: str, start: str = "say(ready=True)") -> MathVerifier:
        path = tmp_path / "worker.py"
        path.write_text(
            "import json, os, sys, time\n"
            "def say(**reply): print(json.dumps(reply), flush=True)\n"
            f"{start}\n"
            "for line in sys.stdin:\n"
            f"    {body}\n"
        )
        monkeypatch.setattr(math_verifier, "_SCRIPT", path)
        verifiers.append(MathVerifier())
        return verifiers[-1]

    yield replace
    for verifier in verifiers:
        verifier.close()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{3} or \boxed{4}", "4"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {5}", "5"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{1\right.}", r"\left\{1\right."),  # escaped braces are text
        (r"\boxed{3}, no: \boxed{4", "3"),  # cut: one that does not close is none
        (r"} } \boxed{5}", "5"),
        (r"{ { \boxed{5}", "5"),
        (r"\boxed{}", ""),
        (r"\boxed 5", None),
        (r"boxed{5}", None),
        ("", None),
        (r"\boxed{" * 30_000, None),
        (r"\boxed{" + "{" * 50_000 + "}" * 50_000 + "}", "{" * 50_000 + "}" * 50_000),
    ],
)
def test_last_boxed(text: str, expected: str | None):
    assert math.last_boxed(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"<think>\boxed{1}</think> It is $\boxed{2}$.", "2"),
        (r"\boxed{ $5$. }", "5"),
        (r"\boxed{}", None),
        (r"\boxed{}<answer>5</answer>", None),  # an empty box is an answer, and no other is sought
        (r"\boxed{5} <answer>6</answer>", "5"),
        ("<answer> 6 </answer>", "6"),
        ("<answer>1</answer> <answer>2</answer>", "2"),
        ("<answer>1 <answer>2</answer>", "2"),
        ("The final answer is: $7$.", "7"),
        ("**Final Answer:** 7", "7"),
        ("Final Answer:\n**7.**", "7"),
        ("Final answer\n\\frac{1}{2}\nbye", r"\frac{1}{2}"),
        ("thus\n#### 1,600", "1,600"),
        ("The answer is 5.", None),
        ("5", None),
        ("", None),
        ("\\boxed{5}" + "x" * 4_000, None),  # the last 4,000 characters count
        ("\\boxed{5}" + "x" * 3_991, "5"),
        ("<answer>" * 12_500, None),
        ("Final answer: 3. No, the final answer is 4.", "4"),
        ("final answer " * 10_000, None),
    ],
)
def test_final_answer(text: str, expected: str | None):
    assert math.final_answer(text) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("5", "5"),
        (r"Therefore $\boxed{\pi}$.", r"\pi"),
        ("3 + 4 = 7\n#### 7", "7"),
        (" $2 \\sqrt{3}$ ", r"2 \sqrt{3}"),
        ("$$x$$", "x"),
        (r"\$5", r"\$5"),
        (r'["$m=n^{2}$"]', "m=n^{2}"),  # a list of one, as it comes out of the data
        ("[1, 2]", "[1, 2]"),  # an interval
    ],
)
def test_gold_answer(answer: str, expected: str):
    assert math.gold_answer(answer) == expected


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        (r"\frac{1}{2}", r"\frac{1}{2}", 1.0),
        (r"x  +  y", "x + y", 1.0),
        ("025", "25", 1.0),
        ("1,600", "1600", 1.0),
        ("+7", "7", 1.0),
        ("-0", "0", 1.0),
        ("-7", "7", 0.0),
        ("1600", "160", 0.0),
        ("9" * 3_000, "9" * 2_999 + "8", 0.0),
    ],
)
def test_equal_texts_and_integers_need_no_worker(
    answer: str, gold: str, expected: float, no_worker: None
):
    assert math.correctness_reward(rf"\boxed{{{answer}}}", gold) == expected


def test_no_answer_needs_no_worker_and_is_counted(no_worker: None):
    with collect_events() as events:
        assert math.correctness_reward("I do not know", "7") == 0.0
    assert events == {"no_answer": 1}


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("0.5", r"\frac{1}{2}", 1.0),
        (r"\dfrac{1}{2}", r"\frac12", 1.0),
        ("50\\%", r"\frac{1}{2}", 1.0),
        ("(x+1)^2", "x^2+2x+1", 1.0),
        (r"\sqrt{12}", r"2\sqrt{3}", 1.0),
        (r"5 \text{ cm}", "5", 1.0),
        ("x=5", "5", 1.0),
        (r"\text{C}", r"\text{(C)}", 1.0),
        ("2,1", r"\{1,2\}", 1.0),
        ("[1, 2)", "[1,2)", 1.0),
        (r"\begin{bmatrix}1\\2\end{bmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", 1.0),
        ("3.14", r"\pi", 0.0),
        ("(2,1)", "(1,2)", 0.0),
        ("4, 3", "3", 0.0),
        ("3 or 4", "3", 0.0),
        ("between 1 and 3", "3", 0.0),  # a number somewhere in the box is no answer
        (r"\frac{0}{0}", "0", 0.0),
        ("", "0", 0.0),
        (r"\frac{", "3", 0.0),
        ("\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"), "3", 0.0),
        ("\ud800", "3", 0.0),  # half of a surrogate pair
    ],
)
def test_equivalent_expressions(answer: str, gold: str, expected: float):
    assert math.correctness_reward(rf"\boxed{{{answer}}}", gold) == expected


def test_the_order_of_gold_and_answer():
    # math-verify takes an interval for a relation, and not a relation for an interval.
    assert math.correctness_reward(r"\boxed{(1,2)}", "1 < x < 2") == 1.0
    assert math.correctness_reward(r"\boxed{1 < x < 2}", "(1,2)") == 0.0


def test_hostile_expressions_are_cut_off_and_delay_nobody():
    with ThreadPoolExecutor(len(HOSTILE)) as threads:
        judged = threads.map(
            lambda text: math.judge(rf"\boxed{{{text}}}", "7/3", timeout=0.3), HOSTILE
        )
        # Meanwhile, in another thread: right, and not one behind the other.
        right = (r"\boxed{0.25}", r"\frac{1}{4}")
        assert math.correctness_reward(*right, timeout=600.0) == 1.0
        assert list(judged) == ["timeout"] * len(HOSTILE)
    assert math.correctness_reward(*right, timeout=600.0) == 1.0


def test_an_overrun_is_zero_and_counted_or_missing():
    sample = RewardSample(completion=rf"\boxed{{{HOSTILE[0]}}}", answer="7/3")
    with collect_events() as events:
        assert math.math_correctness(sample, timeout=0.2) == 0.0
        result = math.math_correctness(sample, timeout=0.2, on_timeout="missing")
    assert result == Invalid("verifier timeout")
    assert events == {"timeout": 2}


def test_an_overrun_is_tried_twice_and_load_is_forgiven(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Too slow the first time only, as on a machine that was busy.
    log = tmp_path / "log"
    note = f"open({str(log)!r}, 'a').write('x'); say(ready=True)"
    slow_once = f"time.sleep(600 if open({str(log)!r}).read() == 'x' else 0); say(equal=True)"
    limits: list[float] = []
    ask = math_verifier._Worker.ask

    def ask_patiently(worker: Any, request: Any, seconds: float) -> Any:
        limits.append(seconds)
        return ask(worker, request, seconds if len(limits) == 1 else 600.0)

    with monkeypatch.context() as patch:
        patch.setattr(math_verifier._Worker, "ask", ask_patiently)
        assert script(slow_once, note).compare("1", "x", timeout=0.3) == "equal"
    assert limits == [0.3, 0.3] and log.read_text() == "xx"
    assert script("time.sleep(600)", note).compare("1", "x", timeout=0.3) == "timeout"
    assert log.read_text() == "xxxx"


@pytest.mark.parametrize(
    ("body", "start", "message"),
    [
        ("os._exit(3)", "say(ready=True)", r"verifier crashed: twice, exit status 3"),
        ("os.kill(os.getpid(), 9)", "say(ready=True)", r"verifier crashed: twice, exit status -9"),
        ("pass", "sys.exit(4)", r"verifier does not start: exit status 4"),
        ("pass", "say(error='ImportError: x'); sys.exit()", "does not start: ImportError: x"),
        ("say(error='raised Odd')", "say(ready=True)", "verifier raised Odd"),
    ],
)
def test_faults_of_the_verifier_are_no_scores(script: Any, body: str, start: str, message: str):
    with pytest.raises(VerifierError, match=message):
        script(body, start).compare("1", "x", timeout=600.0)


def test_faults_make_the_row_invalid(script: Any, monkeypatch: pytest.MonkeyPatch):
    verifier = script("os._exit(3)")
    monkeypatch.setattr(math, "shared_verifier", lambda: verifier)
    sample = RewardSample(completion=r"\boxed{x}", answer="y")
    result = math.math_correctness(sample)
    assert isinstance(result, Invalid) and result.reason == "verifier crashed"


def test_memory(script: Any, monkeypatch: pytest.MonkeyPatch):
    verifier = script("say(error='memory')")
    monkeypatch.setattr(math, "shared_verifier", lambda: verifier)
    with collect_events() as events:
        assert math.correctness_reward(r"\boxed{x}", "y") == 0.0
    assert events == {"memory": 1}
    with pytest.raises(VerifierError, match="verifier memory"):
        math.correctness_reward(r"\boxed{x}", "y", on_timeout="missing")


def test_workers_are_confined(script: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SECRET_TOKEN", "s3cret")
    verifier = script("say(error=str(os.environ.get('SECRET_TOKEN')))")
    with pytest.raises(VerifierError, match="verifier None"):
        verifier.compare("1", "x", timeout=600.0)
    monkeypatch.undo()
    real = MathVerifier()
    assert real.compare("1", "x", timeout=600.0) == "different"
    limits = Path(f"/proc/{real._idle[0].process.pid}/limits").read_text()
    assert str(3 * 1024**3) in next(line for line in limits.splitlines() if "address" in line)
    real.close()


def test_a_worker_that_died_while_idle_is_replaced():
    verifier = MathVerifier()
    assert verifier.compare("1/2", "0.5", timeout=600.0) == "equal"
    process = verifier._idle[0].process
    process.kill()
    process.wait()
    assert verifier.compare("1/2", "0.5", timeout=600.0) == "equal"
    verifier.close()
    assert verifier._idle == []


def test_workers_are_replaced_after_many_comparisons(script: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(math_verifier, "MAX_COMPARISONS", 2)
    verifier = script("say(equal=True)")
    pids: list[int] = []
    for _ in range(3):
        verifier.compare("1", "x", timeout=600.0)
        pids += [worker.process.pid for worker in verifier._idle]
    assert len(pids) == 2 and len(set(pids)) == 2


PARENT = """
import multiprocessing, os, sys, threading
from gdpo_megatron.rewards.builtin import math, math_verifier

def work():
    verifier = math_verifier.shared_verifier()
    assert math.correctness_reward("\\\\boxed{0.5}", "1/2") == 1.0
    print(verifier._idle[0].process.pid, flush=True)
    threading.Event().wait() if sys.argv[1] == "wait" else math.judge(
        "\\\\boxed{9^{9^{9^9}}}", "7/3", timeout=1000)

if __name__ == "__main__":
    # Started before the fork: the child must not use what belongs to its parent.
    assert math.correctness_reward("\\\\boxed{0.5}", "1/2") == 1.0
    child = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    child.start()
    print(child.pid, flush=True)
    child.join()
"""


@pytest.mark.parametrize("doing", ["wait", "compute"])
def test_workers_of_a_forked_daemonic_process_die_with_it(tmp_path: Path, doing: str):
    (tmp_path / "parent.py").write_text(PARENT)
    command = [sys.executable, str(tmp_path / "parent.py"), doing]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child, worker = int(parent.stdout.readline()), int(parent.stdout.readline())
        assert is_running(worker)
        if doing == "compute":
            time.sleep(0.3)
        os.kill(child, signal.SIGKILL)
        parent.wait(timeout=120)
    try:
        wait_until(lambda: not is_running(worker), "the worker outlived its parent")
    finally:
        if is_running(worker):
            os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "holds no expression"),
        (r"so \boxed{ }", "holds no expression"),
        ("x" * 4_001, "has 4001 characters"),
        ('["1", "2"]', "is a list of 2; one string is expected"),
        ('["1"', "Expecting"),
        (HOSTILE[0], "cannot be compared with 7/3: timeout"),
    ],
)
def test_bad_golds_are_refused(monkeypatch: pytest.MonkeyPatch, answer: str, reason: str):
    compare = MathVerifier.compare
    monkeypatch.setattr(
        MathVerifier, "compare", lambda self, a, b, timeout: compare(self, a, b, 0.3)
    )
    with pytest.raises(ValueError, match=reason):
        math.validate_answer(answer)


def test_rows_without_answer():
    assert math.math_correctness(RewardSample(completion=r"\boxed{5}")) is NOT_APPLICABLE


@pytest.mark.parametrize(
    ("file", "num_rows"),
    [
        ("math500", 500),
        ("aime24", 30),
        ("aime_1983_2023_train", 975),
        ("amc22_23", 83),
        ("olympiad_bench", 675),
    ],
)
def test_real_golds_are_valid_and_right(read_rows: Any, file: str, num_rows: int):
    rows = read_rows(f"math/{file}.jsonl")
    assert len(rows) == num_rows
    for row in rows:
        answer = row["answer"]
        answer = answer if isinstance(answer, str) else json.dumps(answer)
        math.validate_answer(answer)
        assert math.correctness_reward(rf"\boxed{{{math.gold_answer(answer)}}}", answer) == 1.0


def test_real_golds_equal_themselves_for_the_verifier(read_rows: Any):
    # As the verifier sees them: here the reward itself would find equal texts.
    for row in read_rows("math/math500.jsonl")[:150]:
        gold = math.gold_answer(row["answer"])
        assert math_verifier.shared_verifier().compare(gold, gold, 5.0) == "equal", gold


@given(st.text(max_size=200))
def test_any_text_has_an_answer_or_none(text: str):
    found = math.final_answer(text)
    assert found is None or (found == found.strip() and found)


@given(st.text(alphabet="ab1^_ ,", max_size=20), st.text(max_size=30))
def test_a_box_at_the_end_is_found(content: str, before: str):
    before = before.replace("\\", "")
    assert math.last_boxed(before + r"\boxed{" + content + "}") == content
