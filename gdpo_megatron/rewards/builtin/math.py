r"""Mathematics: is the final answer the gold, whatever way it is written (math-verify).

In this order, the first that decides:

1. The answer is the last `\boxed{...}` that closes, within the last 4,000 characters; without one,
   the last `<answer>` block; without that, what follows the last "final answer" or `####` on its
   line or, where nothing does, the next one.
2. Equal texts are equal. Two integers are compared as integers.
3. math-verify compares them, in a worker process that is killed when its time is over.

Source of the reward: paper sec. 4.2, {0, 1}; how an answer is found and compared is ours. Counted
as events: `no_answer`, `timeout`, `memory`.
"""

from __future__ import annotations

import json
import re
from typing import Literal, TypeAlias

from gdpo_megatron.config.section import PositiveFloat
from gdpo_megatron.rewards.base import (
    NOT_APPLICABLE,
    RewardResult,
    RewardSample,
    count_event,
    invalid,
    register_reward,
)
from gdpo_megatron.rewards.builtin.math_verifier import (
    MAX_EXPRESSION_CHARS,
    Outcome,
    VerifierError,
    shared_verifier,
)

OnTimeout: TypeAlias = Literal["zero", "missing"]

MAX_TAIL_CHARS = 4_000
# Two tries and the start of a worker fit into reward_suite.sample_timeout_seconds.
DEFAULT_TIMEOUT = 3.0

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_ANSWER_BLOCK = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_MARKER = re.compile(r"(?:####|final\s+answer(?:\s+is)?)\s*:?[ \t*]*\n?", re.IGNORECASE)
_INTEGER = re.compile(r"([+-]?)0*(\d+|\d{1,3}(?:,\d{3})+)", re.ASCII)
# Golds made of these alone are cheap to compare: no power, factorial, binomial, sum or product.
_HARMLESS = re.compile(r"(?:[\w\s.,;:()\[\]{}+\-/=<>$]|\\(?:[dt]?frac|sqrt|pi|text|left|right)\b)*")


def correctness_reward(
    completion: str,
    answer: str,
    *,
    timeout: float = DEFAULT_TIMEOUT,
    on_timeout: OnTimeout = "zero",
) -> float:
    r"""1.0 if the completion's final answer is the gold, else 0.0.

    Args:
        completion: the text; where the answer is looked for, see above.
        answer: the gold as LaTeX; of a text with `\boxed{}` or `####`, what they mark. A JSON list
            of one string counts as that string.
        timeout: seconds for a comparison; it is tried twice. The start of a worker, about a second
            for the first comparison and after each overrun, is not counted.
        on_timeout: what an answer that takes longer, or more than 3 GiB, is worth. With "missing" a
            policy could escape a wrong answer by writing one that cannot be computed.

    Raises:
        VerifierError: the comparison could not be made; with on_timeout="missing" also an overrun.
    """
    verdict = judge(completion, answer, timeout=timeout)
    if verdict not in ("equal", "different"):
        count_event(verdict)
    if verdict in ("timeout", "memory") and on_timeout == "missing":
        raise VerifierError(f"verifier {verdict}")
    return 1.0 if verdict == "equal" else 0.0


def judge(
    completion: str, answer: str, *, timeout: float = DEFAULT_TIMEOUT
) -> Outcome | Literal["no_answer"]:
    """Compare as `correctness_reward` does, and say what came out of it."""
    gold, found = gold_answer(answer), final_answer(completion)
    if found is None:
        return "no_answer"
    if gold == found:
        return "equal"
    gold_integer, found_integer = _integer(gold), _integer(found)
    if gold_integer is not None and found_integer is not None:
        return "equal" if gold_integer == found_integer else "different"
    return shared_verifier().compare(gold, found, timeout)


def final_answer(completion: str) -> str | None:
    """The final answer of a completion, trimmed; None where there is none."""
    tail = completion[-MAX_TAIL_CHARS:]
    found = last_boxed(tail)
    if found is None:
        blocks = _ANSWER_BLOCK.findall(tail) or [
            tail[marker.end() :].split("\n", 1)[0] for marker in _MARKER.finditer(tail)
        ]
        found = blocks[-1] if blocks else ""
    return _trimmed(found) or None


def last_boxed(text: str) -> str | None:
    r"""Content of the `\boxed{...}` that opens last, of those that close; None without one."""
    open_braces: list[tuple[int, bool]] = []
    last, content = -1, None
    for token in _BRACES.finditer(text):
        if token[0] == "}":
            if open_braces:
                start, is_box = open_braces.pop()
                if is_box and start > last:
                    last, content = start, text[start : token.start()]
        elif token[0].endswith("{") and token[0] != r"\{":
            open_braces.append((token.end(), token[0] != "{"))
    return content


def gold_answer(answer: str) -> str:
    r"""The gold expression in a data set's answer: boxed, after `####`, or all of it; trimmed.

    Raises:
        ValueError: the answer is a JSON list of strings, but not of one.
    """
    if answer.startswith('["'):
        answers = json.loads(answer)
        if len(answers) != 1:
            raise ValueError(f"answer is a list of {len(answers)}; one string is expected")
        answer = answers[0]
    boxed = last_boxed(answer)
    return _trimmed(answer.rsplit("####", 1)[-1] if boxed is None else boxed)


def validate_answer(answer: str) -> None:
    """Check, when data is loaded, that a gold can be compared.

    Raises:
        ValueError: it is empty, too long, or more than math-verify can do in time.
    """
    gold = gold_answer(answer)
    if not gold:
        raise ValueError(f"answer {answer!r} holds no expression")
    if len(gold) > MAX_EXPRESSION_CHARS:
        raise ValueError(f"answer has {len(gold)} characters; at most {MAX_EXPRESSION_CHARS}")
    if _HARMLESS.fullmatch(gold):
        return
    try:
        # Not with itself: equal texts are found equal before anything is computed.
        outcome = shared_verifier().compare(gold, r"\frac{7}{3}", DEFAULT_TIMEOUT)
    except VerifierError as error:
        raise ValueError(f"answer {gold!r} cannot be compared: {error}") from error
    if outcome not in ("equal", "different"):
        raise ValueError(f"answer {gold!r} cannot be compared with 7/3: {outcome}")


def _trimmed(text: str) -> str:
    text = " ".join(text.split()).removeprefix("**").removesuffix("**").removesuffix(".").strip()
    while len(text) > 2 and text[0] == text[-1] == "$" and not text.endswith(r"\$"):
        text = text[1:-1].strip()
    return text.removesuffix(".")


def _integer(text: str) -> tuple[str, str] | None:
    match = _INTEGER.fullmatch(text)
    if match is None:
        return None
    digits = match[2].replace(",", "")
    return ("-" if match[1] == "-" and digits != "0" else ""), digits


@register_reward("math_correctness", check_answer=validate_answer)
def math_correctness(
    sample: RewardSample,
    timeout: PositiveFloat = DEFAULT_TIMEOUT,
    on_timeout: OnTimeout = "zero",
) -> RewardResult:
    """`correctness_reward` against the row's answer; does not apply to rows without one."""
    if sample.answer is None:
        return NOT_APPLICABLE
    try:
        return correctness_reward(
            sample.completion, sample.answer, timeout=timeout, on_timeout=on_timeout
        )
    except VerifierError as error:
        return invalid(error.reason, error.detail)
