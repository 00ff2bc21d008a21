"""Evaluation: text as the metrics see it: one normalisation, stated exactly, and what is counted on its words."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

__all__ = ["REPETITION_N", "exact_match", "is_empty", "repetition", "rouge_words", "token_f1", "words"]

REPETITION_N = 4
_ARTICLES = frozenset({"a", "an", "the"})
# Han, Hiragana, Katakana and their iteration marks: written without spaces, so every character is a word
_UNSPACED = re.compile(
    "([\u3005\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])"
)


class _Characters(dict[int, str]):
    """A table for `str.translate` that replaces what is not part of a word; filled as characters turn up."""

    def __init__(self, replacement: str) -> None:
        super().__init__()
        self.replacement = replacement

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        # Cf and variation selectors are invisible, Me draws a box or a circle around the character before it
        other = category[0] in "PS" or category in ("Cf", "Me") or 0xFE00 <= code <= 0xFE0F
        control = category == "Cc" and not character.isspace()
        self[code] = self.replacement if other or control else character
        return self[code]


_DELETED = _Characters("")
_SPACED = _Characters(" ")


def words(text: str, *, keep_articles: bool = False) -> list[str]:
    """Return the words of a text after the normalisation that token-F1 and exact match share.

    In this order:
    1. Unicode NFKC, so that full-width digits, ligatures and composed accents are the plain characters.
    2. Lower case (`str.lower`, so the German sharp s stays). Accents stay: "café" is not "cafe".
    3. Every punctuation mark and symbol (Unicode categories P and S: all of `string.punctuation`, and quotes, dashes,
       currency, emoji of any script) is deleted, not replaced by a space; so are control and invisible format
       characters, enclosing marks and variation selectors. "don't" is "dont", "well-known" is "wellknown",
       "1,000" is "1000", and "3.5" is "35".
    4. Each Chinese or Japanese character (Han, Hiragana, Katakana) is a word by itself; everything else is split at
       white space.
    5. The words "a", "an" and "the" are removed, unless nothing else is left: an option "A" stays an answer.
    Numbers are words like others: "two" is not "2", nor "2" "2.0". On printable ASCII this is the normalisation of
    SQuAD's official script but for the end of rule 5.
    """
    text = unicodedata.normalize("NFKC", text).lower().translate(_DELETED)
    found = _UNSPACED.sub(r" \1 ", text).split()
    if keep_articles:
        return found
    return [word for word in found if word not in _ARTICLES] or found


def rouge_words(text: str) -> list[str]:
    """Return runs of letters and digits in lower case, of any script: rouge-score's words where all is ASCII."""
    text = unicodedata.normalize("NFKC", text).lower().translate(_SPACED)
    return _UNSPACED.sub(r" \1 ", text).split()


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """Return the harmonic mean of precision and recall over bags of `words`, for the reference where it is highest.

    A word counts as often as it occurs in both: `2 * common / (words of one + words of the other)`. Two texts without
    any word agree (1), a text without words and one with words do not (0), as in SQuAD 2.0.
    """
    predicted = Counter(words(prediction))
    return max(_f1(predicted, Counter(words(reference))) for reference in references)


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """Return 1 when the `words` of the prediction are those of a reference in the same order, else 0."""
    if any(prediction == reference for reference in references):
        return 1.0  # so have they the same words
    predicted = words(prediction)
    return float(any(predicted == words(reference) for reference in references))


def repetition(prediction: str, n: int = REPETITION_N) -> float:
    """Return the share of n-grams that occurred before in the same answer: 1 - different n-grams / n-grams.

    Over `words` with articles kept, 0 for an answer of fewer than n words. With n = 4 this is seq-rep-4 of Welleck et
    al., "Neural text generation with unlikelihood training" (2020).
    """
    found = words(prediction, keep_articles=True)
    grams = [tuple(found[start : start + n]) for start in range(len(found) - n + 1)]
    return (len(grams) - len(set(grams))) / len(grams) if grams else 0.0


def is_empty(prediction: str) -> float:
    """Return 1 for an answer without any word: nothing, white space, or punctuation and symbols only; else 0."""
    return float(not words(prediction, keep_articles=True))


def _f1(predicted: Counter[str], reference: Counter[str]) -> float:
    total = predicted.total() + reference.total()
    return 2 * (predicted & reference).total() / total if total else 1.0
