"""Which rows are the same, and which are in the evaluation sets: by normalised text and n-grams.

Two texts are equal where they are the same characters after Unicode composition, each run of blanks
taken as one. For leaks, case is ignored as well, and a text that is not equal may still share most
of its n-grams of words with an evaluation problem: reworded, cut, or with an instruction around it.
The share is of the n-grams of the shorter text, so a problem inside of a longer one is found.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

_WORD = re.compile(r"\w+")


def normalized(text: str) -> str:
    """The text composed (NFC), with each run of blanks as one space.

    Not NFKC: it would make a superscript two a two.
    """
    return " ".join(unicodedata.normalize("NFC", text).split())


@dataclass(frozen=True, slots=True)
class Leak:
    """An evaluation row that a text overlaps with.

    Args:
        row: what `LeakIndex` was told to call it.
        share: of the n-grams of the shorter text; 1.0 where the texts are equal.
        equal: the texts are equal.
    """

    row: str
    share: float
    equal: bool

    def __str__(self) -> str:
        how = "equal to" if self.equal else f"{self.share:.2f} of its n-grams are in"
        return f"{how} {self.row}"


class LeakIndex:
    """The texts of evaluation sets.

    Args:
        rows: (what a row is called, its text).
        ngram_words: n. Texts of fewer words are only compared as a whole.
        min_share: so many of the n-grams of the shorter text, in (0, 1], make a leak.
    """

    def __init__(self, rows: Iterable[tuple[str, str]], *, ngram_words: int, min_share: float):
        self._n = ngram_words
        self._min_share = min_share
        self._names: list[str] = []
        self._sizes: list[int] = []
        self._by_text: dict[str, int] = {}
        self._by_ngram: dict[str, list[int]] = {}
        for name, text in rows:
            number = len(self._names)
            ngrams = self._ngrams(text)
            self._names.append(name)
            self._sizes.append(len(ngrams))
            self._by_text.setdefault(normalized(text).casefold(), number)
            for ngram in ngrams:
                self._by_ngram.setdefault(ngram, []).append(number)

    def __len__(self) -> int:
        return len(self._names)

    def find(self, text: str) -> Leak | None:
        """The evaluation row that a text overlaps with most; None where it is below `min_share`."""
        number = self._by_text.get(normalized(text).casefold())
        if number is not None:
            return Leak(self._names[number], 1.0, True)
        ngrams = self._ngrams(text)
        shared = Counter(number for ngram in ngrams for number in self._by_ngram.get(ngram, ()))
        shares = {n: count / min(len(ngrams), self._sizes[n]) for n, count in shared.items()}
        if not shares:
            return None
        most = max(shares, key=lambda number: (shares[number], -number))
        if shares[most] < self._min_share:
            return None
        return Leak(self._names[most], shares[most], False)

    def _ngrams(self, text: str) -> set[str]:
        words = _WORD.findall(unicodedata.normalize("NFC", text).casefold())
        return {" ".join(words[i : i + self._n]) for i in range(len(words) - self._n + 1)}
