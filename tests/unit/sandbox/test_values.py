"""Values that cross the sandbox's border: honest ones arrive, hostile ones do no harm."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, namedtuple

import pytest

from gdpo_megatron.sandbox.guest.encode import encode
from gdpo_megatron.sandbox.values import MAX_HASHED, decode

Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -(10**40),
        2**53,
        1.5,
        -0.0,
        1e308,
        math.inf,
        "",
        "h\u00e9\ud800\x00",
        [],
        [1, [2.0, "x"], None],
        (),
        (1, (2,)),
        {1, 2},
        frozenset({(1, 2)}),
        {"a": 1, 2: [3], (4, 5): {6}},
        {},
        1 + 2j,
        b"\x00\xff",
    ],
)
def test_round_trip(value: object):
    back = decode(encode(value))
    assert back == value
    assert type(back) is type(value)


def test_nan_stays_unequal():
    assert math.isnan(decode(encode(math.nan)))


def test_subclasses_are_what_they_derive_from():
    class Sly(list):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = None

        def __iter__(self):
            return iter([2])

    for value, plain in (
        (Sly([1]), [1]),
        (Point(1, 2), (1, 2)),
        (Counter("aab"), {"a": 2, "b": 1}),
        (OrderedDict(x=1), {"x": 1}),
    ):
        back = decode(encode(value))
        assert back == plain and type(back) is type(plain)


@pytest.mark.parametrize("value", [object(), lambda: 1, len, {"a": object()}, range(3)])
def test_no_literal(value: object):
    with pytest.raises(TypeError, match="no literal form"):
        encode(value)


def test_depth_is_bounded():
    deep: list = []
    for _ in range(200):
        deep = [deep]
    with pytest.raises(RecursionError):
        encode(deep)
    with pytest.raises(ValueError, match=r"nested too deeply|no value"):
        decode("[" * 200 + "]" * 200)
    with pytest.raises(ValueError, match=r"no value|nested"):
        decode("[" * 1_000_000)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1 2",
        "{}",
        '{"a": 1, "b": 2}',
        '{"exec": "1"}',
        '{"tuple": 1}',
        '{"set": [[]]}',
        '{"set": [{"dict": []}]}',
        '{"dict": [1]}',
        '{"dict": [[1, 2, 3]]}',
        '{"int": 5}',
        '{"int": "zz"}',
        '{"complex": [1]}',
        '{"complex": 1}',
        '{"complex": ["x", 1]}',
        '{"bytes": "x"}',
        '{"bytes": []}',
        '{"tuple": {"tuple": []}}',
        "\x00",
    ],
)
def test_nonsense_is_refused(text: str):
    with pytest.raises(ValueError):
        decode(text)


def test_hash_flood_is_refused():
    entries = ", ".join(f'{{"int": "{i * (2**61 - 1):#x}"}}' for i in range(MAX_HASHED + 1))
    with pytest.raises(ValueError, match="more than"):
        decode(f'{{"set": [{entries}]}}')
