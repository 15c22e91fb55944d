"""The embedded demos: real weights and real data from the package index."""

from __future__ import annotations

import torch

from .data.demos import cities as cities_data
from .data.demos import dinov2_small, raw_pixels, smollm2
from .data.demos import satellite as satellite_data
from .geo import Blocks, GroupKFold, KFold
from .models import load
from .probe import probe
from .run import Run

CITY_PROMPTS = (
    "{name}",
    "The city of {name}",
    "What are the latitude and longitude of {name}?",
)


def satellite(samples: int | None = None) -> Run:
    """Probe DINOv2-S on crops of NASA's Blue Marble.

    All 13 sites, CLS and patch mean, random folds and 15-degree blocks, beside raw pixels.
    """
    data = satellite_data(samples or 1200)
    return probe(
        load(dinov2_small()), data, pool=["cls", "mean:patch"], split=[KFold(), Blocks(15)],
        baselines={"raw pixels": torch.from_numpy(raw_pixels(data))}, progress=True,
    )  # fmt: skip


def cities(samples: int | None = None) -> Run:
    """Probe SmolLM2-135M on the names of the largest cities.

    All 31 sites, last token, three prompts, random folds and folds that keep countries together.
    """
    return probe(
        load(smollm2()), cities_data(samples or 2500), prompts=CITY_PROMPTS, batch_size=64,
        split=[KFold(), GroupKFold("country")], progress=True,
    )  # fmt: skip
