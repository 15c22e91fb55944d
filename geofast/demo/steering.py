"""Demos of edits: does what a model says follow the dimensions that hold the place.

Sites and shares are chosen on pairs of one half of the samples, which the probe was fitted to; what
they do is reported of pairs of the other half.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from ..data import Samples
from ..data.demos import cities as cities_data
from ..data.demos import satellite as satellite_data
from ..data.demos import seeing, smollm2
from ..data.demos.gazetteer import gazetteer
from ..data.demos.satellite import places_seen
from ..data.demos.seeing import QUESTIONS
from ..effects.experiment import steer
from ..effects.locate import locate
from ..effects.prompted import asked_as, chosen_prompt, worded_as
from ..extract import worded
from ..geo import GroupKFold, KFold
from ..geo.gazetteer import named
from ..models import Model
from ..probe import probe
from ..run import Run
from ..steering.asking import require_tokenizer
from .probing import load_quietly

CITY_PROMPT = "The city of {name} is in the country of"
ANSWER = 6  # tokens
SATELLITE_SEED = 2  # the projector was trained and tested on crops of others
_SEED = 0


Parts = Iterator[tuple[str, Any]]
"""A run, where to edit, and what edits change, by mode: as they come to be, with their names."""


def steer_cities(samples: int | None = None) -> Parts:
    """Swap and set the place inside SmolLM2-135M while it says in which country a city is.

    All tokens of the prompt are edited, one by one; so only cities take part whose prompt has as
    many tokens as most. Of those that the model knows, pairs are made. Half of the cities are
    probed and serve to choose where to edit. At that site the dimensions are also swapped in the
    order of |coef| alone, as the study ranks them.

    Parameters
    ----------
    samples
        Cities, the largest of GeoNames, of which those are taken: 200 or more; 900 by default.
    """
    _require_enough(samples, 200, "cities")
    model = load_quietly(smollm2())
    whole = _of_one_length(model, cities_data(900 if samples is None else samples), CITY_PROMPT)
    names = gazetteer()
    country = [names.names("country", code)[0] for code in whole.table["country"]]
    whole = replace(whole, table=whole.table.assign(country=country))
    return _demo(
        model, whole, "country", "lm.layers.*[05]", "mean:text", CITY_PROMPT,
        modes=("swap", "set"), shares=(0.1, 0.2, 0.4), pairs=(24, 60),
        also=("coef",),
    )  # fmt: skip


def steer_images(samples: int | None = None) -> Parts:
    """Swap the place inside the image tokens of a model that says which continent it sees.

    The model is `geofast.data.demos.seeing`; the crops are others than it was trained on, between
    those. The continent that it names is what counts, of pairs whose continents it names rightly
    without an edit. Half of the crops are probed and serve to choose where to edit.

    Parameters
    ----------
    samples
        Crops of NASA's Blue Marble, 60 or more; 300 by default.
    """
    _require_enough(samples, 60, "crops")
    crops = satellite_data(300 if samples is None else samples, seed=SATELLITE_SEED)
    return _demo(
        load_quietly(seeing()), places_seen(crops), "continent", "lm.layers.*[05]", "mean:image",
        QUESTIONS["continent"][0], modes=("swap",), shares=(0.2, 0.4), pairs=(16, 30),
    )  # fmt: skip


def _require_enough(samples: int | None, least: int, what: str) -> None:
    """Refuse so few that folds or pairs run out."""
    if samples is not None and samples < least:
        raise ValueError(f"this demo takes {least} {what} or more (--samples); got {samples}")


def _of_one_length(model: Model, samples: Samples, prompt: str) -> Samples:
    """Keep the samples whose prompt has the commonest number of tokens."""
    (worded_,) = worded(samples, prompt).values()
    tokenizer = require_tokenizer(model)
    lengths = np.array([len(tokenizer(text)["input_ids"]) for text in worded_.inputs])
    commonest = np.bincount(lengths).argmax()
    print(f"{(lengths == commonest).sum()} of {len(samples)} cities: prompts of {commonest} tokens")
    return samples.take(np.flatnonzero(lengths == commonest))


def _demo(
    model: Model,
    whole: Samples,
    column: str,
    sites: str,
    pool: str,
    prompt: str,
    *,
    modes: Sequence[str],
    shares: Sequence[float],
    pairs: tuple[int, int],
    also: Sequence[str] = (),
) -> Parts:
    """Probe half of the samples, choose sites on pairs of them, and steer pairs of the others.

    `also` are other rankings to swap by.
    """
    order = np.random.default_rng(_SEED).permutation(len(whole))
    half = len(whole) // 2
    seen, unseen = whole.take(np.sort(order[:half])), whole.take(np.sort(order[half:]))
    run = probe(
        model, seen, sites=sites, pool=pool, prompts=prompt,
        split=[KFold(), GroupKFold(column)], progress=True,
    )  # fmt: skip
    yield "run", run
    names = {column: column}
    drawn = [
        pairs_between(known(model, some, run, column), column, n)
        for some, n in zip((seen, unseen), pairs, strict=True)
    ]
    found = locate(model, seen, drawn[0], run, names=names, modes=modes, shares=shares)
    yield "locate", found
    for mode in modes:
        best = found.table[found.table["mode"] == mode].iloc[0]
        print(f"Chosen: {mode} at {best['site']}, {100 * best['share']:.3g} % of the dimensions")
        if not best["score"] > 0:
            print("though there it does no more than random dimensions, or more damage than asked")
        chosen = float(best["share"])
        options: dict[str, Any] = {
            "site": best["site"], "shares": (chosen, *(s for s in shares if s != chosen)),
            "mode": mode, "names": names, "max_new_tokens": ANSWER, "progress": True,
        }  # fmt: skip
        yield mode, steer(model, unseen, drawn[1], run, **options)
        for ranking in also if mode == "swap" else ():
            # Of the other controls one is the same again, and one but of another length.
            options |= {"ranking": ranking, "controls": ("random dims", "shuffled labels")}
            yield f"{mode}-{ranking}", steer(model, unseen, drawn[1], run, **options)


def known(model: Model, samples: Samples, run: Run, column: str) -> pd.DataFrame:
    """Return the rows of the samples of which the model names what a column says."""
    prompt = chosen_prompt(run)
    _, worded_ = worded_as(run, samples, prompt)
    asked = asked_as(run, model, samples, prompt)
    inputs = [worded_.load(i) for i in range(len(samples))]
    said = asked.generate(inputs, batch_size=64, max_new_tokens=ANSWER)
    names, places = gazetteer(), samples.table[column]
    texts = [str(text) if samples.kind == "text" else "" for text in inputs]
    right = [
        bool(named(text, {column: place}, names, prompt=said_before)[column])
        for text, place, said_before in zip(said, places, texts, strict=True)
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
