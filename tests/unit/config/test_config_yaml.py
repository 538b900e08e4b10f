"""YAML as the config files use it. Not covered: every corner of PyYAML's scanner."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdpo_megatron.config import yaml_text
from gdpo_megatron.errors import InputError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("1.0e-06", 1e-6),
        ("-2E3", -2000.0),
        (".5", 0.5),
        (".inf", float("inf")),
        ("-.inf", float("-inf")),
        ("12", 12),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("true", True),
        ("yes", "yes"),
        ("off", "off"),
        ("~", None),
        ("", None),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("1_000", "1_000"),
        ("</tool_call>", "</tool_call>"),
        ("[0.9, 1]", [0.9, 1]),
        ("'1e-6'", "1e-6"),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object):
    parsed, problems = yaml_text.parse(text)
    assert parsed == value
    assert type(parsed) is type(value)
    assert problems == []


def test_each_doubled_key_is_named_with_both_lines():
    text = "a: 1\nb:\n  lr: 1\n  lr: 2\na: 3\n"
    _, problems = yaml_text.parse(text)
    assert problems == [
        (4, "key 'lr' twice, first on line 3"),
        (5, "key 'a' twice, first on line 1"),
    ]


def test_merge_keys_do_not_count_as_doubled():
    text = "base: &base {lr: 1, eps: 2}\nmine:\n  <<: *base\n  lr: 3\n"
    value, problems = yaml_text.parse(text)
    assert value["mine"] == {"lr": 3, "eps": 2}
    assert problems == []


def test_aliases_share_nothing_afterwards():
    value, _ = yaml_text.parse("a: &it {x: 1}\nb: *it\n")
    value["a"]["x"] = 2
    assert value["b"] == {"x": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1\nc: 2\n", ":3: not valid YAML: while parsing a flow sequence"),
        ("a: 1\n\tb: 2\n", ":2: not valid YAML: while scanning for the next token found"),
        ("a: b: c\n", ":1: not valid YAML: mapping values are not allowed here"),
        ("a: 1\n---\nb: 2\n", ":2: not valid YAML: expected a single document"),
        ("a: &x [*x]\n", ": not valid YAML: an alias (*name) stands inside of what it names"),
        ("a: !!python/object:os.x {}\n", ":1: not valid YAML: could not determine a constructor"),
        ("- a\n", ": must hold sections (name: ...), not a list"),
        ("just words\n", ": must hold sections (name: ...), not a single value"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, text: str, message: str):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        yaml_text.read_mapping(path, [])
    assert len(caught.value.problems) == 1
    assert "\n" not in caught.value.problems[0]
    assert caught.value.problems[0].startswith(f"{path}{message}")


def test_keys_that_are_no_strings_are_named_and_left_out(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text("1: x\n[a]: y\nb: z\n")
    problems: list[str] = []
    assert yaml_text.read_mapping(path, problems) == {"b": "z"}
    assert problems == [
        f"{path}:1: key 1 must be a string; put it in quotes",
        f"{path}:2: key a list or mapping must be a string; put it in quotes",
    ]


def test_missing_file_names_the_nearest(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(InputError, match=r"no config file .*/confg.yaml; did you mean 'config"):
        yaml_text.read_mapping(tmp_path / "confg.yaml", [])
    with pytest.raises(InputError, match=r"config file .*: Is a directory"):
        yaml_text.read_mapping(tmp_path, [])


def test_not_utf8(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_bytes(b"a: \xff\n")
    with pytest.raises(InputError, match=r"not UTF-8 text \(byte 3\)"):
        yaml_text.read_mapping(path, [])


_CHARACTERS = st.characters(codec="utf-8") | st.sampled_from("\n\r\x85\u2028 :#'\"-")
_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(_CHARACTERS)
    | st.sampled_from(["1e-6", "yes", "null", "010", "2024-01-01", "1:30", "=", "<<", "", "~"])
)


def test_a_string_of_several_lines_stays_readable():
    assert yaml_text.dump({"k": "Q: {q}\nA:"}) == 'k: "Q: {q}\\nA:"\n'


@settings(max_examples=50)
@given(
    st.dictionaries(
        st.text(_CHARACTERS, max_size=5),
        _LEAVES | st.lists(_LEAVES) | st.dictionaries(st.sampled_from(["a", "<<", "1"]), _LEAVES),
        max_size=4,
    )
)
def test_what_is_dumped_reads_back_the_same(data: dict[str, object]):
    parsed, problems = yaml_text.parse(yaml_text.dump(data))
    assert parsed == data
    assert problems == []
