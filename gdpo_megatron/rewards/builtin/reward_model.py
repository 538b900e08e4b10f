"""Reward models behind HTTP: plain JSON, vLLM's `/score`, or a judge behind chat completions.

    reward_model        {"samples": [{"prompt", "completion", "answer"}, ...]}
                        -> {"scores": [number or null, ...]}
    reward_model_score  {"model", "text_1": [prompt, ...], "text_2": [completion, ...]}
                        -> {"data": [{"index", "score"}, ...]}
    reward_model_chat   an OpenAI-compatible chat completion per sample -> the last number in the
                        reply that `score_pattern` finds

A group is judged at once: in one request, or in as many at a time as `max_concurrent` says. What
fails is `invalid`, with a reason; a score is never made up. Counted as event: `retries`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from string import Formatter
from typing import Annotated, Any, TypeAlias

import regex
from pydantic import AfterValidator, Field

from gdpo_megatron.config.section import NonNegativeFloat, PositiveFloat, PositiveInt
from gdpo_megatron.rewards.base import (
    NOT_APPLICABLE,
    RewardResult,
    RewardSample,
    invalid,
    register_reward,
)
from gdpo_megatron.rewards.builtin.http_json import JsonServer, KeyVariable, ServerError, Url

TEMPLATE_FIELDS = ("prompt", "completion", "answer")
DEFAULT_SCORE_PATTERN = r"(?i)score\W{0,8}?(-?\d+(?:\.\d+)?)"
_PATTERN_SECONDS = 0.2  # on the event loop of all async rewards


def check_template(template: str) -> str:
    """Return a template with {completion} and no unknown field, or raise ValueError."""
    names = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
    if unknown := sorted(names.difference(TEMPLATE_FIELDS)):
        raise ValueError(
            f"has the field {{{unknown[0]}}}; the fields are {{prompt}}, {{completion}} and "
            "{answer}, and {{ is a brace"
        )
    if "completion" not in names:
        raise ValueError("lacks the field {completion}")
    return template


def check_score_pattern(pattern: str) -> str:
    """Return a regular expression with just one group, or raise ValueError."""
    try:
        num_groups = regex.compile(pattern).groups
    except regex.error as error:
        raise ValueError(f"no regular expression: {error}") from error
    if num_groups != 1:
        raise ValueError(f"must have one group, around the number, and has {num_groups}")
    return pattern


def check_range(bounds: tuple[float, float]) -> tuple[float, float]:
    """Return an ascending pair, or raise ValueError."""
    if not bounds[0] < bounds[1]:
        raise ValueError("the first must be smaller than the second")
    return bounds


Retries: TypeAlias = Annotated[int, Field(ge=0, le=20)]


@register_reward("reward_model", batch=True)
async def reward_model(
    samples: Sequence[RewardSample],
    url: Url,
    api_key_env: KeyVariable | None = None,
    timeout: PositiveFloat = 30.0,
    request_timeout: PositiveFloat = 15.0,
    num_retries: Retries = 3,
) -> list[RewardResult]:
    """Scores of a group from a server that takes plain JSON; see the module.

    Args:
        samples: a group.
        url: the full address.
        api_key_env: variable with a key to send as bearer token.
        timeout: seconds for the group, retries included.
        request_timeout: seconds for one try.
        num_retries: further tries where one may help: no connection, no answer in time, and the
            statuses 408, 429, 500, 502, 503 and 504.
    """
    body = [{name: getattr(sample, name) for name in TEMPLATE_FIELDS} for sample in samples]
    server = JsonServer(
        url,
        timeout=timeout,
        request_timeout=request_timeout,
        num_retries=num_retries,
        api_key_env=api_key_env,
    )
    return await _score_group(
        server, {"samples": body}, lambda reply: _field(reply, "scores"), len(samples)
    )


async def _score_group(
    server: JsonServer, body: object, read: Callable[[Any], Any], num_samples: int
) -> list[RewardResult]:
    """One request for a group; whatever fails, fails for all of it."""
    try:
        async with server:
            return _scores(read(await server.post(body)), num_samples)
    except ServerError as error:
        return [invalid(error.reason, error.detail)] * num_samples


@register_reward("reward_model_score", batch=True)
async def reward_model_score(
    samples: Sequence[RewardSample],
    url: Url,
    model: str,
    api_key_env: KeyVariable | None = None,
    timeout: PositiveFloat = 30.0,
    request_timeout: PositiveFloat = 15.0,
    num_retries: Retries = 3,
) -> list[RewardResult]:
    """Scores of a group from vLLM's `/score`, prompt against completion.

    Args:
        samples: a group.
        url: the full address, with `/score`.
        model: its name there.
        api_key_env: as for `reward_model`, like the rest.
        timeout: seconds for the group, retries included.
        request_timeout: seconds for one try.
        num_retries: further tries.
    """
    prompts = [sample.prompt for sample in samples]
    completions = [sample.completion for sample in samples]
    server = JsonServer(
        url,
        timeout=timeout,
        request_timeout=request_timeout,
        num_retries=num_retries,
        api_key_env=api_key_env,
    )
    body = {"model": model, "text_1": prompts, "text_2": completions}
    return await _score_group(
        server, body, lambda reply: _in_order(_field(reply, "data")), len(samples)
    )


@register_reward("reward_model_chat", batch=True)
async def reward_model_chat(
    samples: Sequence[RewardSample],
    url: Url,
    model: str,
    template: Annotated[str, AfterValidator(check_template)],
    score_range: Annotated[tuple[float, float], AfterValidator(check_range)],
    score_pattern: Annotated[str, AfterValidator(check_score_pattern)] = DEFAULT_SCORE_PATTERN,
    system_prompt: str | None = None,
    max_tokens: PositiveInt = 1024,
    temperature: NonNegativeFloat = 0.0,
    max_concurrent: PositiveInt = 8,
    api_key_env: KeyVariable | None = None,
    timeout: PositiveFloat = 30.0,
    request_timeout: PositiveFloat = 15.0,
    num_retries: Retries = 3,
) -> list[RewardResult]:
    """Scores of a group from a judge behind an OpenAI-compatible API, one request per sample.

    Args:
        samples: a group.
        url: the full address, with `/v1/chat/completions`.
        model: its name there.
        template: the question, with {prompt}, {completion} and {answer}. With {answer} it does not
            apply to rows without one.
        score_range: the scores that are possible; another one is invalid.
        score_pattern: regular expression with one group around the score; the last match counts.
        system_prompt: sent in front, if any.
        max_tokens: of the reply.
        temperature: of the judge.
        max_concurrent: requests at a time.
        api_key_env: as for `reward_model`, like the rest.
        timeout: seconds for the group, retries included.
        request_timeout: seconds for one try.
        num_retries: further tries of each request.
    """
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    needs_answer = any(name == "answer" for _, name, _, _ in Formatter().parse(template))
    slots = asyncio.Semaphore(max_concurrent)
    server = JsonServer(
        url,
        timeout=timeout,
        request_timeout=request_timeout,
        num_retries=num_retries,
        api_key_env=api_key_env,
    )

    async def judge(sample: RewardSample) -> RewardResult:
        if needs_answer and sample.answer is None:
            return NOT_APPLICABLE
        fields = {name: getattr(sample, name) for name in TEMPLATE_FIELDS}
        question = {"role": "user", "content": template.format_map(fields)}
        body = {"model": model, "messages": [*system, question]}
        try:
            async with slots:
                reply = await server.post(
                    body | {"max_tokens": max_tokens, "temperature": temperature}
                )
            return _read_score(_reply_text(reply), score_pattern, score_range)
        except ServerError as error:
            return invalid(error.reason, error.detail)

    async with server:
        return list(await asyncio.gather(*map(judge, samples)))


def _field(reply: Any, name: str) -> list[Any]:
    values = reply.get(name) if isinstance(reply, dict) else None
    if not isinstance(values, list):
        raise ServerError("server reply of the wrong form", f"has no list '{name}'")
    return values


def _in_order(entries: list[Any]) -> list[Any]:
    try:
        by_index = {entry["index"]: entry["score"] for entry in entries}
        return [by_index[index] for index in range(len(entries))]
    except (KeyError, TypeError):
        message = "'data' must hold an index, from 0, and a score each"
        raise ServerError("server reply of the wrong form", message) from None


def _scores(values: list[Any], num_samples: int) -> list[RewardResult]:
    if len(values) != num_samples:
        raise ServerError(
            "server sent the wrong number of scores", f"{len(values)} for {num_samples}"
        )
    return [_score(value) for value in values]


def _score(value: Any) -> RewardResult:
    if value is None:
        return invalid("server gave no score")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return invalid("server sent a score that is no number", type(value).__name__)
    try:
        return float(value)
    except OverflowError:
        return invalid("server sent a score that is no number", "beyond a float")


def _reply_text(reply: Any) -> str:
    try:
        text = reply["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        text = None
    if not isinstance(text, str):
        raise ServerError("server reply of the wrong form", "has no choices[0].message.content")
    return text


def _read_score(text: str, pattern: str, bounds: tuple[float, float]) -> RewardResult:
    try:
        found = [match[1] for match in regex.finditer(pattern, text, timeout=_PATTERN_SECONDS)]
    except TimeoutError:
        return invalid("judge's reply takes the pattern too long")
    if not found or found[-1] is None:
        return invalid("judge gave no score")
    try:
        score = float(found[-1])
    except ValueError:
        score = math.nan
    if not bounds[0] <= score <= bounds[1]:
        return invalid("judge's score out of range", found[-1][:40])
    return score
