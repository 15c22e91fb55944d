"""Demos of edits: does what a model names follow the dimensions that hold the place?

Sites and shares are chosen on pairs of one half of the samples, which the probe was fitted to; what
they do is reported of pairs of the other half.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from ..data import Samples
from ..data.demos import cities as cities_data
from ..data.demos import satellite as satellite_data
from ..data.demos import seeing, smollm2
from ..data.demos.satellite import places_seen
from ..effects.experiment import steer
from ..effects.locate import Located, locate
from ..effects.outcome import Steered
from ..geo import GroupKFold, KFold
from ..models import Model
from ..probe import probe
from ..run import Run
from .probing import load_quietly

CITY_PROMPT = "The city of {name} is in the country of"
SHARES = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
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

    The country that it names is what counts, of pairs whose countries it names rightly without an
    edit. Half of the cities are probed and serve to choose where to edit.

    Parameters
    ----------
    samples
        Cities, the largest of GeoNames; 1,000 by default.
    """
    whole = cities_data(1000 if samples is None else samples)
    return _demo(
        load_quietly(smollm2()), whole, "country", ("lm.layers.*",), ["last"], CITY_PROMPT,
        calibrating=100, reported=400, answer=6,
    )  # fmt: skip


def _demo(
    model: Model,
    whole: Samples,
    column: str,
    sites: Sequence[str],
    pools: Sequence[str],
    prompt: str,
    *,
    calibrating: int,
    reported: int,
    answer: int,
) -> Demo:
    order = np.random.default_rng(_SEED).permutation(len(whole))
    half = len(whole) // 2
    seen, unseen = whole.take(np.sort(order[:half])), whole.take(np.sort(order[half:]))
    run = probe(
        model, seen, sites=list(sites), pool=list(pools), prompts=prompt,
        split=[KFold(), GroupKFold(column)], progress=True,
    )  # fmt: skip
    names = {column: column}
    found = locate(
        model, seen, pairs_between(seen.table, column, calibrating), run, names=names,
        modes=("swap", "set"), shares=SHARES[:-1],
    )  # fmt: skip
    steered = {}
    for mode in ("swap", "set"):
        site = best_of(found, mode)
        steered[mode] = steer(
            model, unseen, pairs_between(unseen.table, column, reported), run, site=site,
            shares=SHARES, mode=mode, names=names, max_new_tokens=answer, progress=True,
        )  # fmt: skip
    return Demo(run, found, steered)


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
