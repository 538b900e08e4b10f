"""Which fields of a data file's rows are read, and what is made of them."""

from __future__ import annotations

from gdpo_megatron.config.section import section


@section
class RowFieldsConfig:
    """What the rows of a file hold."""

    prompt_key: str = "prompt"
    """Field of the prompt: a string, or chat messages [{role, content}, ...]."""

    answer_key: str | None = "answer"
    """Field given to rewards as `answer`; null where there is none."""

    prompt_template: str | None = None
    """Wraps a string prompt, with the row's fields in braces: "Q: {question} A:"."""

    system_prompt: str | None = None
    """Makes a string prompt a chat of system and user message."""
