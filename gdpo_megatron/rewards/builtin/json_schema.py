"""JSON schema: 1 where the completion's JSON is valid under a schema, 0 elsewhere.

The JSON is the text of the last `<tag>` block if a tag is named; else the last fenced code block
that is marked json or nothing; else all of the text; in each case behind the thinking text. What
`jsonschema` decides holds, with three changes for text that a model wrote: references are never
fetched, the patterns of a schema are bounded in time, and uniqueness takes linear time. `format` is
an annotation, as the standard has it. Counted as events: `no_json` and `timeout`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeAlias

import regex
from pydantic import AfterValidator, StringConstraints

from gdpo_megatron.rewards.base import (
    NOT_APPLICABLE,
    RewardResult,
    RewardSample,
    count_event,
    register_reward,
)
from gdpo_megatron.rewards.builtin import bounded_json
from gdpo_megatron.rewards.builtin.fenced import fenced_blocks

Schema: TypeAlias = Mapping[str, Any] | bool

PATTERN_SECONDS = 1.0
MAX_NESTING = 64
"""A validator needs several frames of Python's stack for each level."""


def schema_reward(completion: str, schema: Schema, *, tag: str | None = None) -> float:
    """1.0 if the completion holds JSON that is valid under the schema, else 0.0.

    Args:
        completion: the text; where the JSON is looked for, see above.
        schema: a JSON Schema; without `$schema`, of draft 2020-12.
        tag: name of the tag around the JSON, without angle brackets.

    Raises:
        ValueError: see `check_schema`.
    """
    validator = validator_of(schema)
    text = _json_text(completion, tag)
    try:
        value = bounded_json.loads("" if text is None else text, max_nesting=MAX_NESTING)
    except ValueError:
        count_event("no_json")
        return 0.0
    try:
        return 1.0 if validator.is_valid(value) else 0.0
    except TimeoutError:
        count_event("timeout")
        return 0.0


def check_schema(schema: Schema) -> Schema:
    """Return the schema, or raise ValueError where it is none or refers to another document."""
    validator_of(schema)
    return schema


def validator_of(schema: Schema) -> Any:
    """A validator of `jsonschema` with the changes said above; remembered.

    It raises TimeoutError where a pattern takes longer than PATTERN_SECONDS.

    Raises:
        ValueError: see `check_schema`.
    """
    return _validator(json.dumps(schema, sort_keys=True))


def check_schema_text(text: str) -> None:
    """Check, when data is loaded, that an answer is a JSON Schema; raises ValueError if not."""
    _validator(text)


def _json_text(completion: str, tag: str | None) -> str | None:
    text = completion.split("</think>", 1)[-1]
    if tag is not None:
        _, opening, rest = text.rpartition(f"<{tag}>")
        content, closing, _ = rest.partition(f"</{tag}>")
        return content if opening and closing else None
    blocks = [block.content for block in fenced_blocks(text) if block.language in ("", "json")]
    return blocks[-1] if blocks else text


@functools.lru_cache(maxsize=256)
def _validator(text: str) -> Any:
    import jsonschema
    import jsonschema.validators
    import referencing
    import referencing.exceptions
    import referencing.jsonschema

    try:
        schema: Any = json.loads(text)
    except ValueError as error:
        raise ValueError(f"no JSON: {error}") from error
    if not isinstance(schema, dict | bool):
        raise ValueError(f"a JSON Schema is an object, not {text[:40]}")
    base = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        base.check_schema(schema)  # pyright: ignore[reportArgumentType] (true and false are schemas)
    except jsonschema.SchemaError as error:
        where = "/".join(map(str, error.absolute_path)) or "its top"
        raise ValueError(f"no JSON Schema: {error.message[:200]} (at {where})") from error
    resource = referencing.Resource.from_contents(
        schema, default_specification=referencing.jsonschema.DRAFT202012
    )
    registry = referencing.Registry().with_resource("", resource)
    _check_references(resource, registry.resolver_with_root(resource))
    bounded = {"pattern": _pattern, "patternProperties": _pattern_properties}
    validator_class = jsonschema.validators.extend(base, bounded | {"uniqueItems": _unique_items})
    return validator_class(schema, registry=registry)


def _check_references(resource: Any, resolver: Any) -> None:
    import referencing.exceptions

    contents = resource.contents
    for keyword in ("$ref", "$dynamicRef"):
        reference = contents.get(keyword) if isinstance(contents, dict) else None
        if isinstance(reference, str):
            try:
                resolver.lookup(reference)
            except referencing.exceptions.Unresolvable as error:
                raise ValueError(f"{keyword} '{reference}' is not in the schema") from error
    for subresource in resource.subresources():
        _check_references(subresource, resolver.in_subresource(subresource))


# Replacements of keywords: (validator, the keyword's value, instance, schema) -> its errors.


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[Any]:
    from jsonschema import ValidationError

    if validator.is_type(instance, "string") and not _matches(pattern, instance):
        yield ValidationError("does not match the pattern")


def _pattern_properties(
    validator: Any, properties: Mapping[str, Any], instance: Any, schema: Any
) -> Iterator[Any]:
    if validator.is_type(instance, "object"):
        for pattern, subschema in properties.items():
            for name, value in instance.items():
                if _matches(pattern, name):
                    yield from validator.descend(value, subschema, path=name, schema_path=pattern)


def _unique_items(validator: Any, unique: bool, instance: Any, schema: Any) -> Iterator[Any]:
    from jsonschema import ValidationError

    if unique and validator.is_type(instance, "array"):
        # Distinct JSON is distinct as text: numbers were normalised by the parser.
        if len({json.dumps(item, sort_keys=True) for item in instance}) < len(instance):
            yield ValidationError("has items that are equal")


def _matches(pattern: str, text: str) -> bool:
    return regex.search(pattern, text, timeout=PATTERN_SECONDS) is not None


Tag: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][\w-]*$")]


@register_reward("json_schema")
def json_schema(
    sample: RewardSample,
    schema: Annotated[dict[str, Any], AfterValidator(check_schema)],
    tag: Tag | None = None,
) -> RewardResult:
    """`schema_reward` of the completion."""
    return schema_reward(sample.completion, schema, tag=tag)


@register_reward("json_schema_answer", check_answer=check_schema_text)
def json_schema_answer(sample: RewardSample, tag: Tag | None = None) -> RewardResult:
    """`schema_reward` under the schema that is the row's answer; not without one."""
    if sample.answer is None:
        return NOT_APPLICABLE
    return schema_reward(sample.completion, json.loads(sample.answer), tag=tag)
