"""Demos of probing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..data.demos import cities as cities_data
from ..data.demos import dinov2_small, smollm2
from ..data.demos import satellite as satellite_data
from ..geo import Blocks, GroupKFold, KFold
from ..models import Model, load
from ..probe import probe
from ..ridge import ALPHAS
from ..run import Run

CITY_PROMPTS = (
    "{name}",
    "The city of {name}",
    "What are the latitude and longitude of {name}?",
)


def satellite(samples: int | None = None, alphas: Sequence[float] = ALPHAS) -> Run:
    """Probe DINOv2-S on crops of NASA's Blue Marble.

    All 13 sites, CLS and patch mean, random folds and 15-degree blocks, beside the pixels.
    """
    data = satellite_data(1200 if samples is None else samples)
    model = load_quietly(dinov2_small())
    return probe(
        model, data, pool=["cls", "mean:patch"], split=[KFold(), Blocks(15)], alphas=alphas,
        controls="pixels", progress=True,
    )  # fmt: skip


def cities(samples: int | None = None, alphas: Sequence[float] = ALPHAS) -> Run:
    """Probe SmolLM2-135M on the names of the largest cities.

    All 31 sites, last token, three prompts, random folds and folds that keep countries together,
    beside bags of tokens.
    """
    data = cities_data(2500 if samples is None else samples)
    model = load_quietly(smollm2())
    return probe(
        model, data, prompts=CITY_PROMPTS, alphas=alphas,
        split=[KFold(), GroupKFold("country")], controls="tokens", progress=True,
    )  # fmt: skip


def load_quietly(folder: Path) -> Model:
    """Load a model of the cache, and say which."""
    print(f"Model: {folder}")
    with _no_bar():
        return load(folder)


@contextmanager
def _no_bar() -> Iterator[None]:
    """Keep quiet the bar that transformers draws for weights which load in a second."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
