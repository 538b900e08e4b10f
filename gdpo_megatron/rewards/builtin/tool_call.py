"""Tool calling in the ToolRL format: is the answer well-formed, and are the calls right.

With S_max = 1 + sum over gold calls (1 + number of parameters), the correctness is

    6 * S / S_max - 3,  S = overlap of names + sum over matched calls (overlap of keys
                                                                       + number of equal values)

where an overlap is a Jaccard index. The two modes differ in what the formula leaves open.

`reference` gives, to the last bit, what the code released with the paper gives (NVlabs/GDPO,
verl/utils/reward_score/rlla.py; verl has the same function), quirks included, without its switches
by environment variables: an exact list of calls earns 3 at once, so there order matters and
elsewhere it does not; gold calls are matched greedily, in their order; a tag in the thinking text
opens the block of calls.

`paper` is the formula: the matching with the largest sum, the overlap of names as sets, the calls
looked for behind the thinking text.

In both, values compare as in Python (True == 1 == 1.0, "1" != 1), correctness does not look at the
format, and what cannot be read is -3. Counted as events: `no_calls` and `unreadable_calls`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Literal, TypeAlias, cast

from gdpo_megatron.rewards.base import (
    NOT_APPLICABLE,
    RewardResult,
    RewardSample,
    count_event,
    register_reward,
)
from gdpo_megatron.rewards.builtin import bounded_json

Mode: TypeAlias = Literal["reference", "paper"]
NameOverlap: TypeAlias = Literal["multiset", "set"]

MAX_SCORE, MIN_SCORE = 3.0, -3.0

# What is larger is answered without parsing, as a parse error: the reference would spend any time,
# and stop at a nesting that depends on how deep the caller's own stack is.
MAX_COMPLETION_CHARS = bounded_json.MAX_CHARS
MAX_JSON_NESTING = bounded_json.MAX_NESTING

# Key: (gold holds <tool_call>, gold holds <response>). Value: pattern, tags that occur just once.
_FORMATS = {
    (False, True): (r"^<think>.*?</think>\n<response>.*?</response>$", ("response",)),
    (True, False): (r"^<think>.*?</think>\n<tool_call>\n.*?\n</tool_call>$", ("tool_call",)),
    (True, True): (
        r"^<think>.*?</think>\n<tool_call>\n.*?\n</tool_call>\n<response>.*?</response>$",
        ("tool_call", "response"),
    ),
    (False, False): (r"^<think>.*?</think>$", ()),
}

# All that a prediction of the wrong form can raise on its way through the scoring.
_WRONG_FORM = (ValueError, KeyError, TypeError, AttributeError)


def format_reward(completion: str, ground_truth: str) -> float:
    """1.0 if the completion has the tags that the ground truth has, in order and once; else 0.0."""
    completion = completion.strip()
    pattern, tags = _FORMATS["<tool_call>" in ground_truth, "<response>" in ground_truth]
    # Counting first keeps the search linear: the lazy parts then have one place to end.
    for tag in tags:
        if completion.count(f"<{tag}>") != 1 or completion.count(f"</{tag}>") != 1:
            return 0.0
    return 1.0 if re.search(pattern, completion, re.DOTALL) else 0.0


def correctness_reward(
    completion: str,
    ground_truth: str,
    mode: Mode = "reference",
    *,
    name_overlap: NameOverlap | None = None,
) -> float:
    """Score the tool calls of a completion, in [-3, 3].

    A ground truth without `<tool_call>` gives 0.0 for any completion. A completion whose calls are
    missing or cannot be read (JSON, one object per line) gives -3.

    Args:
        completion: the text.
        ground_truth: the tagged text of the data set.
        mode: see above.
        name_overlap: count repeated names or not; default what the mode says, "multiset" for
            reference and "set" for paper. With "set" a repeated call costs nothing.

    Raises:
        ValueError: the ground truth cannot be read; `validate_ground_truth` says so beforehand.
    """
    if mode == "paper":
        completion, ground_truth = _after_thinking(completion), _after_thinking(ground_truth)
    if "<tool_call>" not in ground_truth:
        return 0.0
    gold = _parse_gold(ground_truth)
    if "<tool_call>" not in completion or "</tool_call>" not in completion:
        count_event("no_calls")
        return MIN_SCORE
    try:
        if len(completion) > MAX_COMPLETION_CHARS:
            raise ValueError(f"longer than {MAX_COMPLETION_CHARS} characters")
        predicted = _parse_calls(completion)
        if mode == "reference" and gold == predicted:
            return MAX_SCORE
        return _score_calls(gold, predicted, mode, name_overlap)
    except _WRONG_FORM:
        count_event("unreadable_calls")
        return MIN_SCORE


def validate_ground_truth(text: str) -> None:
    """Check, when data is loaded, that a ground truth can be scored.

    Raises:
        ValueError: a tag without partner or twice, a call that is not JSON on one line or lacks
            `name` or `parameters`, or no tag of the format at all.
    """
    for tag in ("tool_call", "response"):
        num_open, num_close = text.count(f"<{tag}>"), text.count(f"</{tag}>")
        if num_open != num_close or num_open > 1:
            raise ValueError(
                f"ground truth has <{tag}> {num_open} times and </{tag}> {num_close} times; "
                f"each may occur once"
            )
        if num_open and text.index(f"<{tag}>") > text.index(f"</{tag}>"):
            raise ValueError(f"ground truth has </{tag}> before <{tag}>")
    if "<tool_call>" in text:
        for number, call in enumerate(_parse_gold(text), 1):
            if not isinstance(call, dict):
                raise ValueError(f"ground truth, call {number}: not a JSON object")
            fields = cast("dict[str, Any]", call)
            if not isinstance(fields.get("name"), str):
                raise ValueError(f"ground truth, call {number}: needs a string 'name'")
            if not isinstance(fields.get("parameters"), dict):
                raise ValueError(f"ground truth, call {number}: needs an object 'parameters'")
    elif "<response>" not in text and not format_reward(text, text):
        raise ValueError(
            "ground truth holds neither <tool_call> nor <response> nor just a <think> block; "
            "does data.answer_key name the right field?"
        )


def _parse_gold(ground_truth: str) -> list[Any]:
    try:
        return _parse_calls(ground_truth)
    except ValueError as error:
        raise ValueError(f"ground truth, {error}") from error


def _after_thinking(text: str) -> str:
    return text.split("</think>", 1)[-1]


def _parse_calls(text: str) -> list[Any]:
    # A second opening tag ends the block as well, as in the reference.
    block = text.split("<tool_call>")[1].split("</tool_call>")[0].strip()
    calls: list[Any] = []
    for number, line in enumerate(block.split("\n"), 1):
        if bounded_json.nesting(line) > MAX_JSON_NESTING:
            raise ValueError(f"call {number}: nested deeper than {MAX_JSON_NESTING}")
        try:
            calls.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"call {number} is not JSON on one line: {error}") from error
    return calls


def _multiset_jaccard(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    if first == second:  # two empty ones agree: the released code says 1
        return 1.0
    overlap = (Counter(first) & Counter(second)).total()
    return overlap / (len(first) + len(second) - overlap)


def _score_calls(
    gold: list[Any], predicted: list[Any], mode: Mode, name_overlap: NameOverlap | None
) -> float:
    names = [[call["name"] for call in calls] for calls in (gold, predicted)]
    if (name_overlap or _NAME_OVERLAP[mode]) == "set":
        names = [list(dict.fromkeys(some)) for some in names]
    score = _multiset_jaccard(*names)
    for matched in _MATCHING[mode](gold, predicted):
        score += matched  # one by one from here on: to the last bit as the reference adds
    best_possible = 1.0 + sum(1.0 + len(call["parameters"]) for call in gold)
    return (MAX_SCORE - MIN_SCORE) * score / best_possible + MIN_SCORE


def _match_greedily(gold: list[Any], predicted: list[Any]) -> Iterator[float]:
    unused = dict(enumerate(predicted))
    for call in gold:
        best_score, best_index = 0.0, None
        for index, candidate in unused.items():
            if candidate["name"] != call["name"]:
                continue
            candidate_score = _score_parameters(call["parameters"], candidate["parameters"])
            if candidate_score > best_score:
                best_score, best_index = candidate_score, index
        if best_index is not None:
            del unused[best_index]
            yield best_score


def _match_optimally(gold: list[Any], predicted: list[Any]) -> Iterator[float]:
    from scipy.optimize import (
        linear_sum_assignment,  # a third of a second that others need not wait
    )

    scores = [
        [
            _score_parameters(call["parameters"], candidate["parameters"])
            if candidate["name"] == call["name"]
            else 0.0
            for candidate in predicted
        ]
        for call in gold
    ]
    for row, column in zip(*linear_sum_assignment(scores, maximize=True), strict=True):
        yield scores[row][column]


def _score_parameters(gold: dict[str, Any], predicted: dict[str, Any]) -> float:
    keys = _multiset_jaccard(list(gold.keys()), list(predicted.keys()))
    return keys + sum(key in predicted and predicted[key] == gold[key] for key in gold)


_NAME_OVERLAP: dict[Mode, NameOverlap] = {"reference": "multiset", "paper": "set"}
_MATCHING: dict[Mode, Callable[[list[Any], list[Any]], Iterator[float]]] = {
    "reference": _match_greedily,
    "paper": _match_optimally,
}


@register_reward("tool_call_format", check_answer=validate_ground_truth)
def tool_call_format(sample: RewardSample) -> RewardResult:
    """`format_reward` against the row's answer; does not apply to rows without one."""
    if sample.answer is None:
        return NOT_APPLICABLE
    return format_reward(sample.completion, sample.answer)


@register_reward("tool_call_correctness", check_answer=validate_ground_truth)
def tool_call_correctness(
    sample: RewardSample, mode: Mode = "reference", name_overlap: NameOverlap | None = None
) -> RewardResult:
    """`correctness_reward` against the row's answer; does not apply to rows without one."""
    if sample.answer is None:
        return NOT_APPLICABLE
    return correctness_reward(sample.completion, sample.answer, mode, name_overlap=name_overlap)
