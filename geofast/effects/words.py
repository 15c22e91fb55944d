"""What an edit does to the words of an answer apart from its places."""

from __future__ import annotations

from ..geo.gazetteer import Gazetteer, words

_PLACE = "\0"  # no word of a text


def stability(before: str, after: str, gazetteer: Gazetteer) -> float:
    """Return how much of the rest of an answer stays when the model is edited.

    It is ROUGE-L's F1 (Lin, "ROUGE: A package for automatic evaluation of summaries", 2004), with
    place names blanked out: twice the longest common subsequence of the two answers' words over
    the sum of their lengths. Names that follow one another (Lyon, France) make one blank, so it
    does not count how many there are. Case, accents and punctuation do not count. A name that the
    gazetteer does not have is a word like any other.

    Parameters
    ----------
    before, after : str
        The unedited model's answer and the edited one's.
    gazetteer : Gazetteer
        Names to blank out.

    Returns
    -------
    float
        1 where nothing else changed (also when both answers are empty), 0 where nothing stayed.
    """
    first, second = _blanked(before, gazetteer), _blanked(after, gazetteer)
    if not first and not second:
        return 1.0
    return 2 * _common(first, second) / (len(first) + len(second))


def repetition(text: str, n: int = 3) -> float:
    """Return the share of a text's n-grams of words that it has said before.

    It is seq-rep-n (Welleck et al., "Neural text generation with unlikelihood training", 2020): 1 -
    distinct n-grams / n-grams. Case, accents and punctuation do not count.

    Parameters
    ----------
    text : str
        An answer.
    n : int
        Words in an n-gram.

    Returns
    -------
    float
        0 where no n-gram comes twice, and where the text has fewer than n words; below 1.

    Raises
    ------
    ValueError
        For n below 1.
    """
    if n < 1:
        msg = f"An n-gram has at least one word, got n = {n}."
        raise ValueError(msg)
    said = _words(text)
    grams = [tuple(said[i : i + n]) for i in range(len(said) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _words(text: str) -> list[str]:
    return [word for word in words(text) if word[0].isalnum()]


def _blanked(text: str, gazetteer: Gazetteer) -> list[str]:
    """Return a text's words, each run of place names one blank."""
    rest: list[str] = []
    end = 0
    for mention in gazetteer.mentions(text):
        rest += _words(text[end : mention.start])
        if rest[-1:] != [_PLACE]:
            rest.append(_PLACE)
        end = mention.end
    return rest + _words(text[end:])


def _common(first: list[str], second: list[str]) -> int:
    """Return the length of the longest common subsequence.

    A row of the usual table is kept as the bits of one integer (Crochemore et al., "A fast and
    practical bit-vector algorithm for the longest common subsequence problem", 2001), which takes
    microseconds for an answer of a hundred words, where the table takes a millisecond.
    """
    where: dict[str, int] = {}
    for i, word in enumerate(first):
        where[word] = where.get(word, 0) | 1 << i
    full = (1 << len(first)) - 1
    row = full
    for word in second:
        match = row & where.get(word, 0)
        row = ((row + match) | (row - match)) & full
    return len(first) - row.bit_count()
