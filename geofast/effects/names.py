"""What the samples of an experiment are called, and which of them the model knows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..geo.gazetteer import Gazetteer, named
from ..models import Model
from ..steering.asking import require_tokenizer
from . import study
from .arms import Index
from .request import Request


@dataclass(frozen=True, eq=False)
class Names:
    """What the distinct samples are called, and whether a text says so."""

    gazetteer: Gazetteer | None
    places: list[dict[str, str]]
    """By level, of each distinct sample."""
    prompts: list[str]
    """What is asked about each."""
    usual: list[str]
    """The name that counts; empty where there is none."""
    tokens: int
    """The most that such a name has."""

    @classmethod
    def of(cls, asked: Request, model: Model, gazetteer: Gazetteer | None) -> Names:
        """Collect the names; the asked level must be there for every sample."""
        count = len(asked.rows)
        found = [asked.values(i) for i in range(count)] if gazetteer is not None else [{}] * count
        texts = asked.samples.kind == "text"
        asking = next(iter(model.prompts), "")
        prompts = [str(asked.samples.load(int(r))) if texts else asking for r in asked.rows]
        usual = [""] * count
        if gazetteer is not None and asked.level:
            for i, one in enumerate(found):
                if asked.level not in one:
                    column = asked.names[asked.level]
                    raise ValueError(f"{asked.where(i)} has no {column}: fill the column in")
                usual[i] = next(iter(gazetteer.names(asked.level, one[asked.level])), "")
        # As it goes on after a word, or begins a line.
        every = [*usual, *(f" {name}" for name in usual)]
        longest = max(map(len, token_ids(model, every)), default=0)
        return cls(gazetteer, found, prompts, usual, longest)

    def says(self, text: str, of: int, beside: int | None, asked: int) -> dict[str, bool | None]:
        """Tell whether an answer about sample `asked` names `of`, which is not `beside`."""
        if self.gazetteer is None:
            return {}
        other = {} if beside is None else self.places[beside]
        return named(
            text, self.places[of], self.gazetteer, beside=other, prompt=self.prompts[asked]
        )

    def about(
        self, asked: Request, answers: Sequence[str], numbers: Index
    ) -> dict[str, dict[str, Any]]:
        """What distinct samples are asked, answer unedited and are called, by id: for people."""
        ids, found = asked.ids[asked.rows], dict[str, dict[str, Any]]()
        for n in numbers.tolist():
            names = {
                level: list(self.gazetteer.names(level, value)) if self.gazetteer else []
                for level, value in self.places[n].items()
            }
            found[str(ids[n])] = {"asked": self.prompts[n], "answer": answers[n], "names": names}
        return found

    def spot(self, asked: Request, number: int) -> study.Spot:
        """What the study looks for; codes, which it did not have, are names."""
        row = asked.samples.table.iloc[int(asked.rows[number])].to_dict()
        for level, column in asked.names.items():
            value = row[column]
            if self.gazetteer is not None and isinstance(value, str) and value.isupper():
                row[column] = next(iter(self.gazetteer.names(level, value)), value)
        return study.Spot.of(row, asked.names)

    def by_study(self, asked: Request, answers: Sequence[str]) -> list[bool]:
        """Tell which unedited answers the study takes for known."""
        return [study.known(text, self.spot(asked, i)) for i, text in enumerate(answers)]


def token_ids(model: Model, texts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of each text, special ones left out."""
    tokenizer = require_tokenizer(model)
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return ids


def kept_pairs(
    asked: Request, known: Names, answers: Sequence[str]
) -> tuple[Index, dict[str, int]]:
    """Numbers of the pairs that are kept, and how many are not for which reason."""
    every = np.arange(len(asked.pairs))
    if asked.keep == "all":
        return every, {}
    says: list[bool | None]
    if asked.protocol == "study":
        what = "place with its city, region or country, by substrings as the study"
        says = [*known.by_study(asked, answers)]
    else:
        what = asked.level
        says = [known.says(text, i, None, i).get(what) for i, text in enumerate(answers)]
    why: Counter[str] = Counter()
    kept = []
    for pair, (s, t) in enumerate(zip(asked.sources.tolist(), asked.targets.tolist(), strict=True)):
        reason = ""
        if known.usual[s].casefold() == known.usual[t].casefold():
            reason = f"both of one {asked.level}"
        elif says[s] is None or says[t] is None:
            reason = f"the {asked.level} stands in the prompt"
        elif not says[s]:
            reason = f"unedited, the model does not name the source's {what}"
        elif not says[t]:
            reason = f"unedited, the model does not name the target's {what}"
        if reason:
            why[reason] += 1
        else:
            kept.append(pair)
    if not kept:
        reasons = "; ".join(f"{n}: {reason}" for reason, n in why.items())
        raise ValueError(
            f"of {len(every)} pair{'s' * (len(every) > 1)} none is left ({reasons}); keep='all' "
            "(--all-pairs) keeps them"
        )
    return np.array(kept, dtype=np.int64), dict(why)
