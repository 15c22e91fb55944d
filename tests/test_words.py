"""What an edit does to the words apart from the places, against values worked by hand."""

from __future__ import annotations

import random

import pytest

from geofast.effects.words import _common, repetition, stability
from geofast.geo.gazetteer import Entry, Gazetteer

PLACES = Gazetteer(
    [
        Entry("country", "France", demonyms=("French",)),
        Entry("country", "Japan"),
        Entry("country", "United States", ("USA", "US")),
        Entry("place", "Lyon"),
        Entry("place", "Nice"),
        Entry("place", "New York"),
    ]
)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("It lies in France.", "It lies in Japan.", 1),
        ("It lies in Lyon, France.", "It lies in Japan!", 1),  # one blank for both names
        ("It lies in France.", "it LIES in New York", 1),
        ("It lies in France.", "It lies in the sea.", 2 * 3 / (4 + 5)),  # it lies in
        ("a b c d", "a c d x y", 2 * 3 / 9),
        ("a b c d", "d c b a", 2 * 1 / 8),  # order counts
        ("a nice view of France", "a view of France", 2 * 4 / 9),  # "nice" is a word here
        ("a view of Nice", "a view of Japan", 1),
        ("a French town", "a Japan town", 1),
        ("Café de France", "cafe de Lyon", 1),
        ("Lyon", "Lyon Lyon Lyon Lyon", 1),
        ("Lyon", "the the the", 0),
        ("", "the", 0),
        ("", "", 1),
        ("...", "", 1),
    ],
)
def test_stability(before, after, expected):
    assert stability(before, after, PLACES) == pytest.approx(expected)
    assert stability(after, before, PLACES) == pytest.approx(expected)


def test_the_gazetteer_makes_the_difference():
    texts = "It lies in France.", "It lies in Japan."
    assert stability(*texts, Gazetteer([])) == pytest.approx(2 * 3 / 8)


def test_common_equals_the_table():
    draw = random.Random(0)
    for _ in range(200):
        first, second = (draw.choices("abcd", k=draw.randint(0, 90)) for _ in range(2))
        table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
        for i, one in enumerate(first):
            for j, other in enumerate(second):
                same = table[i][j] + 1
                table[i + 1][j + 1] = (
                    same if one == other else max(table[i][j + 1], table[i + 1][j])
                )
        assert _common(first, second) == table[-1][-1]


@pytest.mark.parametrize(
    ("text", "n", "expected"),
    [
        ("a b c d e", 3, 0),
        ("the cat the cat the cat", 3, 1 - 2 / 4),  # the cat the, cat the cat, twice each
        ("The cat, the CAT. The cat!", 3, 1 - 2 / 4),
        ("no no no no no", 1, 1 - 1 / 5),
        ("no no no no no", 3, 1 - 1 / 3),
        ("a b a b", 2, 1 - 2 / 3),
        ("no no", 3, 0),  # too short to tell
        ("", 3, 0),
    ],
)
def test_repetition(text, n, expected):
    assert repetition(text, n) == pytest.approx(expected)


def test_repetition_reads_three_words():
    text = "the cat the cat the cat"
    assert repetition(text) == repetition(text, 3) != repetition(text, 2)


def test_no_words_make_no_n_gram():
    with pytest.raises(ValueError, match="at least one word, got n = 0"):
        repetition("a b", 0)
