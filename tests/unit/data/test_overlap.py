"""Equal texts and shared n-grams, counted by hand."""

from __future__ import annotations

import pytest

from gdpo_megatron.data.overlap import Leak, LeakIndex, normalized


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("a  b\n", " a\u00a0b", True),
        ("caf\u00e9", "cafe\u0301", True),
        ("x\u00b2", "x2", False),
        ("a b", "ab", False),
        ("A", "a", False),
    ],
)
def test_normalized(one: str, other: str, same: bool):
    assert (normalized(one) == normalized(other)) is same


def test_shares_are_of_the_shorter_text():
    """n = 3. The evaluation text has 6 words, so 4 trigrams."""
    index = LeakIndex([("e1", "a b c d e f")], ngram_words=3, min_share=0.01)

    def share(text: str) -> float:
        found = index.find(text)
        return 0.0 if found is None else found.share

    assert share("x y, A B (c) d - e... f z") == 1.0  # 4 of 4
    assert share("a b c d") == 1.0  # both of its 2
    assert share("a b c x d e f") == pytest.approx(2 / 4)  # abc, def of 4; it has 5
    assert share("x a b c") == pytest.approx(1 / 2)
    assert share("c b a f e d") == 0.0
    assert share("a b") == 0.0  # too short for a trigram, and not equal


def test_the_row_with_the_largest_share_counts():
    rows = [("e1", "a b c d e f"), ("e2", "a b c d x y"), ("e3", "short")]
    index = LeakIndex(rows, ngram_words=3, min_share=0.5)
    assert len(index) == 3
    assert index.find("a b c d x z") == Leak("e2", 0.75, False)
    assert index.find("a b c q r s") is None  # 1 of 4 with either
    assert index.find(" SHORT\n") == Leak("e3", 1.0, True)
    assert index.find("short!") is None
    found = index.find("A b c d e  f")
    assert found == Leak("e1", 1.0, True) and str(found) == "equal to e1"
    assert str(index.find("a b c d x z")) == "0.75 of its n-grams are in e2"


@pytest.mark.parametrize(("min_share", "leaks"), [(0.5, True), (0.51, False)])
def test_the_least_share_is_inclusive(min_share: float, leaks: bool):
    index = LeakIndex([("e1", "a b c d e f")], ngram_words=3, min_share=min_share)
    assert (index.find("a b c x d e f") is not None) is leaks
