"""Demos of edits: does what a model says follow the dimensions that hold the place.

Sites and shares are chosen on pairs of one half of the samples, which the probe was fitted to; what
they do is reported of pairs of the other half.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from ..data import Samples
from ..data.demos import cities as cities_data
from ..data.demos import smollm2
from ..data.demos.gazetteer import gazetteer
from ..effects.experiment import steer
from ..effects.locate import Located, locate
from ..effects.outcome import Steered
from ..effects.prompted import prompted
from ..extract import worded
from ..geo import GroupKFold, KFold
from ..geo.gazetteer import named
from ..models import Model
from ..probe import probe
from ..run import Run
from ..steering.asking import require_tokenizer
from .probing import load_quietly

CITY_PROMPT = "The city of {name} is in the country of"
SHARES = (0.1, 0.2, 0.4)
CALIBRATING, REPORTED = 24, 60  # pairs
_SEED = 0


@dataclass(frozen=True, eq=False)
class Demo:
    """What a demo of edits made: a run, where to edit, and what edits change."""

    run: Run
    located: Located
    steered: dict[str, Steered]
    """By mode."""

    def parts(self) -> Iterator[tuple[str, Any]]:
        """What is saved, in the order in which it came to be, with the names of the folders."""
        yield "run", self.run
        yield "locate", self.located
        yield from self.steered.items()


def steer_cities(samples: int | None = None) -> Demo:
    """Swap and set the place inside SmolLM2-135M while it says in which country a city is.

    All tokens of the prompt are edited, one by one; so only cities take part whose prompt has as
    many tokens as most. Of those that the model knows, pairs are made. Half of the cities are
    probed and serve to choose where to edit.

    Parameters
    ----------
    samples
        Cities, the largest of GeoNames, of which those are taken; 2,000 by default.
    """
    model = load_quietly(smollm2())
    whole = _of_one_length(model, cities_data(2000 if samples is None else samples), CITY_PROMPT)
    names = gazetteer()
    country = [names.names("country", code)[0] for code in whole.table["country"]]
    whole = replace(whole, table=whole.table.assign(country=country))
    return _demo(model, whole, "country", "lm.layers.*[05]", "mean:text", CITY_PROMPT, answer=6)


def _of_one_length(model: Model, samples: Samples, prompt: str) -> Samples:
    """Keep the samples whose prompt has the commonest number of tokens."""
    (worded_,) = worded(samples, prompt).values()
    tokenizer = require_tokenizer(model)
    lengths = np.array([len(tokenizer(text)["input_ids"]) for text in worded_.inputs])
    commonest = np.bincount(lengths).argmax()
    print(f"{(lengths == commonest).sum()} of {len(samples)} cities: prompts of {commonest} tokens")
    return samples.take(np.flatnonzero(lengths == commonest))


def _demo(
    model: Model, whole: Samples, column: str, sites: str, pool: str, prompt: str, *, answer: int
) -> Demo:
    order = np.random.default_rng(_SEED).permutation(len(whole))
    half = len(whole) // 2
    seen, unseen = whole.take(np.sort(order[:half])), whole.take(np.sort(order[half:]))
    run = probe(
        model, seen, sites=sites, pool=pool, prompts=prompt,
        split=[KFold(), GroupKFold(column)], progress=True,
    )  # fmt: skip
    names = {column: column}
    pairs = [
        pairs_between(known(model, some, run, column), column, n)
        for some, n in ((seen, CALIBRATING), (unseen, REPORTED))
    ]
    found = locate(
        model, seen, pairs[0], run, names=names,
        modes=("swap", "set"), shares=SHARES,
    )  # fmt: skip
    steered = {}
    for mode in ("swap", "set"):
        site = best_of(found, mode)
        steered[mode] = steer(
            model, unseen, pairs[1], run, site=site,
            shares=SHARES, mode=mode, names=names, max_new_tokens=answer, progress=True,
        )  # fmt: skip
    return Demo(run, found, steered)


def known(model: Model, samples: Samples, run: Run, column: str) -> pd.DataFrame:
    """Return the rows of the samples of which the model names what a column says."""
    asked, worded_, _ = prompted(model, samples, run)
    inputs = [worded_.load(i) for i in range(len(samples))]
    said = asked.generate(inputs, batch_size=64, max_new_tokens=6)
    names, places = gazetteer(), samples.table[column]
    texts = [str(text) if samples.kind == "text" else "" for text in inputs]
    right = [
        bool(named(text, {column: place}, names, prompt=prompt)[column])
        for text, place, prompt in zip(said, places, texts, strict=True)
    ]
    print(f"Of {len(samples)} the model names the {column} of {sum(right)} rightly")
    return samples.table[right]


def pairs_between(table: pd.DataFrame, column: str, n: int) -> pd.DataFrame:
    """Draw pairs of samples of different kinds: a kind for each end first, then a sample of it.

    So a country with many cities comes no more often than one with few.
    """
    generator = np.random.default_rng(_SEED)
    ids = table.groupby(column)["id"].agg(list)
    if len(ids) < 2:
        raise ValueError(f"all samples have one {column}: take more")
    pairs: dict[tuple[str, str], None] = {}
    for _ in range(50 * n):
        kinds = generator.choice(len(ids), 2, replace=False)
        source, target = (str(generator.choice(ids.iloc[kind])) for kind in kinds)
        pairs[source, target] = None
        if len(pairs) == n:
            break
    return pd.DataFrame([*pairs], columns=["source", "target"])


def best_of(found: Located, mode: str) -> str:
    """Return the site at which a mode has the highest score."""
    table = found.table[found.table["mode"] == mode]
    return str(table.iloc[0]["site"])
