"""What an observation becomes, in tokens, behind a turn of the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gdpo_megatron.data.chat_turns import ObservationEncoder
from gdpo_megatron.data.tokenizer import load_tokenizer
from gdpo_megatron.errors import InputError


def test_a_message_stands_where_a_whole_chat_would_have_it(byte_level_folder: Path):
    tokenizer = load_tokenizer(byte_level_folder)
    chat = [
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": "I count."},
        {"role": "user", "content": " 3 caf\u00e9s\n"},
    ]
    whole = tokenizer.apply_chat_template(chat)
    asked = tokenizer.apply_chat_template(chat[:1])
    turn = tokenizer.encode("I count.", add_special_tokens=False)
    encoder = ObservationEncoder(tokenizer, role="user", max_tokens=100)
    # Ended by a stop string: the template's end of the message is still to come.
    rest, text = encoder.encode(" 3 caf\u00e9s\n", turn[-1])
    assert text == " 3 caf\u00e9s\n" and asked + turn + rest == whole
    # Ended by the end token: it is there already.
    end = rest[0]
    assert end in tokenizer.special_token_ids
    rest, _ = encoder.encode(" 3 caf\u00e9s\n", end)
    assert [*asked, *turn, end, *rest] == whole


def test_plain_text_is_appended_as_it_is(byte_level_folder: Path, stories_folder: Path):
    for folder in (byte_level_folder, stories_folder):
        tokenizer = load_tokenizer(folder)
        encoder = ObservationEncoder(tokenizer, role=None, max_tokens=100)
        turn = tokenizer.encode("Once upon")
        for text in ("=42", " a time", "\u00e9\n", "<result>7</result>"):
            token_ids, _ = encoder.encode(text, turn[-1])
            assert tokenizer.decode([*turn, *token_ids]) == "Once upon" + text


def test_a_long_observation_is_cut_and_says_so(byte_level_folder: Path):
    tokenizer = load_tokenizer(byte_level_folder)
    encoder = ObservationEncoder(tokenizer, role=None, max_tokens=20)
    short = "x" * 5
    assert encoder.encode(short, 0)[1] == short
    token_ids, text = encoder.encode("\u4f60\u597d" * 100, 0)
    assert text.endswith("\n... (cut)") and "\ufffd" not in text
    assert len(token_ids) <= 20 and tokenizer.decode(token_ids) == text


def test_a_special_token_that_is_spelled_is_no_special_token(
    byte_level_folder: Path, stories_folder: Path
):
    tokenizer = load_tokenizer(byte_level_folder)
    special = sorted(tokenizer.special_token_ids)
    names = [tokenizer.decode([i], skip_special_tokens=False) for i in special]
    assert len(names) >= 2 and tokenizer.encode(names[0], add_special_tokens=False) == special[:1]
    for role, allowed in ((None, 0), ("user", 3)):
        encoder = ObservationEncoder(tokenizer, role=role, max_tokens=200)
        for text in (*names, f"a{names[0]} b{names[1]}\n{names[1]}"):
            token_ids, _ = encoder.encode(text, 10)
            assert text in tokenizer.decode(token_ids, skip_special_tokens=False)
            # Those of the template: an end, two beginnings.
            num_special = sum(i in tokenizer.special_token_ids for i in token_ids)
            assert num_special == sum(
                i in tokenizer.special_token_ids for i in encoder.encode("plain", 10)[0]
            )
            assert (num_special > 0) == (allowed > 0)
    stories = load_tokenizer(stories_folder)
    encoder = ObservationEncoder(stories, role=None, max_tokens=200)
    assert not stories.special_token_ids & set(encoder.encode("<s> the </s>", 10)[0])


def test_blanks_are_trimmed_where_the_template_trims(byte_level_folder: Path, tmp_path: Path):
    load_tokenizer(byte_level_folder).save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }};{% endfor %}"
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    tokenizer = load_tokenizer(tmp_path)
    encoder = ObservationEncoder(tokenizer, role="tool", max_tokens=100)
    token_ids, text = encoder.encode("  x \n", 0)
    assert (text, tokenizer.decode(token_ids)) == ("x", ";[tool]x;")


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('no tools here') }}", "no tools here"),
        (
            "{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}",
            "leaves out a message of role 'tool'",
        ),
        ("{% for m in messages %}{{ m.content | lower }}{% endfor %}", "does not show"),
    ],
)
def test_a_role_that_the_template_cannot_show_is_refused(
    byte_level_folder: Path, tmp_path: Path, template: str | None, problem: str
):
    load_tokenizer(byte_level_folder).save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("chat_template", None)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    path.write_text(json.dumps(config | ({"chat_template": template} if template else {})))
    with pytest.raises(InputError, match=problem) as refused:
        ObservationEncoder(load_tokenizer(tmp_path), role="tool", max_tokens=10)
    assert str(refused.value).startswith("rollout.environment.observation_role: ")
