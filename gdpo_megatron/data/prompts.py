"""Data files to tokenised prompts (`train`, `eval`) and to prompt-completion pairs (`sft`).

Rows too long for the run are left out, counted and told; they are never cut, because a cut question
asks something else.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from gdpo_megatron.config.schema import DataConfig
from gdpo_megatron.data.rows import DataRow, Problems, read_rows
from gdpo_megatron.data.tokenizer import Tokenizer
from gdpo_megatron.errors import InputError
from gdpo_megatron.types import Prompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTRow:
    """A prompt and what to answer; `completion_ids` ends with the end token."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]


def load_prompts(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    path: str | Path,
    base_dir: Path | None = None,
    max_prompt_tokens: int,
    reward_names: Collection[str] | None = None,
) -> list[Prompt]:
    """Read and tokenise the prompts of a data file, in file order.

    String prompts get the special tokens of the tokenizer's own configuration (for many models a
    begin token), chats those of its template.

    Args:
        config: names of the fields, template, system prompt.
        tokenizer: of the policy.
        path: jsonl or parquet file; config.train or config.eval.
        base_dir: folder that a relative path starts from; default the working directory.
        max_prompt_tokens: what fits beside the completion; config.max_prompt_tokens counts too.
        reward_names: those of the config, where the rows' own are to be checked against them.

    Raises:
        InputError: all problems of the file, or every prompt is too long.
    """
    limit = min(max_prompt_tokens, config.max_prompt_tokens or max_prompt_tokens)
    rows = read_rows(config, path, base_dir=base_dir, kind="rl", reward_names=reward_names)
    file = (base_dir or Path.cwd()) / path
    encoded = _encode_prompts(rows, tokenizer, file)
    prompts = [
        Prompt(
            prompt_id=row.prompt_id,
            token_ids=token_ids,
            text=text,
            answer=row.answer,
            metadata=row.metadata,
        )
        for row, (token_ids, text) in zip(rows, encoded, strict=True)
        if len(token_ids) <= limit
    ]
    longest = max(len(token_ids) for token_ids, _ in encoded)
    _report_left_out(file, len(rows) - len(prompts), len(rows), f"a prompt of {limit}", longest)
    return prompts


def load_sft_rows(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    path: str | Path,
    base_dir: Path | None = None,
    max_sequence_length: int,
) -> list[SFTRow]:
    """Read and tokenise prompt-completion pairs, in file order.

    Prompt and completion are tokenised apart, as a completion is generated apart from its prompt,
    and the end token is put behind the completion.

    Args:
        config: names of the fields, template, system prompt.
        tokenizer: of the policy.
        path: jsonl or parquet file; config.train.
        base_dir: folder that a relative path starts from; default the working directory.
        max_sequence_length: of prompt and completion together.

    Raises:
        InputError: all problems of the file, no end token, or every row is too long.
    """
    if tokenizer.eos_token_id is None:
        raise InputError(f"tokenizer {tokenizer.path} has no end token, which sft must teach")
    rows = read_rows(config, path, base_dir=base_dir, kind="sft")
    file = (base_dir or Path.cwd()) / path
    encoded = _encode_prompts(rows, tokenizer, file)
    max_prompt_tokens = config.max_prompt_tokens or max_sequence_length
    kept: list[SFTRow] = []
    longest = 0
    for row, (prompt_ids, _) in zip(rows, encoded, strict=True):
        assert row.completion is not None
        completion_ids = tokenizer.encode(row.completion, add_special_tokens=False)
        completion_ids.append(tokenizer.eos_token_id)
        length = len(prompt_ids) + len(completion_ids)
        longest = max(longest, length)
        if len(prompt_ids) <= max_prompt_tokens and length <= max_sequence_length:
            kept.append(SFTRow(prompt_ids=prompt_ids, completion_ids=tuple(completion_ids)))
    bound = f"{max_sequence_length} in all or a prompt of {max_prompt_tokens}"
    _report_left_out(file, len(rows) - len(kept), len(rows), bound, longest)
    return kept


def _encode_prompts(
    rows: list[DataRow], tokenizer: Tokenizer, file: Path
) -> list[tuple[tuple[int, ...], str]]:
    """Return token ids and text of each prompt."""
    problems = Problems(file)
    encoded: list[tuple[tuple[int, ...], str]] = []
    for row in rows:
        if isinstance(row.prompt, str):
            token_ids, text = tokenizer.encode(row.prompt), row.prompt
        else:
            try:
                token_ids = tokenizer.apply_chat_template(row.prompt)
            except InputError as error:
                problems.add(row.line, str(error))
                continue
            text = tokenizer.decode(token_ids, skip_special_tokens=False)
        if not token_ids:
            problems.add(row.line, "the prompt is empty, and the tokenizer adds no begin token")
        encoded.append((tuple(token_ids), text))
    problems.raise_if_any()
    return encoded


def _report_left_out(
    file: Path, num_left_out: int, num_rows: int, bound: str, longest: int
) -> None:
    if num_left_out == num_rows:
        raise InputError(
            f"data file {file}: all {num_rows} rows are longer than {bound} tokens; raise "
            "data.max_prompt_tokens or model.max_sequence_length"
        )
    if num_left_out:
        logger.warning(
            "%s: %d of %d rows are left out, longer than %s tokens (longest %d)",
            file,
            num_left_out,
            num_rows,
            bound,
            longest,
        )
