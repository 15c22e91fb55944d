from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from geofast.effects.arms import CONTROLS
from geofast.effects.outcome import Steered, summarise
from geofast.geo import great_circle_km
from geofast.report import steering, steering_figures, steering_text

CITIES = {
    "lyon": ("Lyon", "France", 45.8, 4.8), "osaka": ("Osaka", "Japan", 34.7, 135.5),
    "lima": ("Lima", "Peru", -12.0, -77.0), "accra": ("Accra", "Ghana", 5.6, -0.2),
    "perth": ("Perth", "Australia", -31.9, 115.9), "oslo": ("Oslo", "Norway", 59.9, 10.8),
    "quito": ("Quito", "Ecuador", -0.2, -78.5), "delhi": ("Delhi", "India", 28.7, 77.2),
    "suva": ("Suva", "Fiji", -18.1, 178.4), "denver": ("Denver", "United States", 39.7, -105.0),
}  # fmt: skip
STRENGTH = {"edit": 0.8, "random dims": 0.1, "random direction": 0.02, "shuffled labels": 0.12,
            "mean difference": 0.45}  # fmt: skip
ALIASES = {"United States": ["United States", "USA", "US"]}


def example(
    n: int = 60,
    shares: tuple[float, ...] = (0.1, 0.2, 0.4, 0.8),
    controls: tuple[str, ...] = CONTROLS,
    strength: dict[str, float] | None = None,
    **info: object,
) -> Steered:
    """An experiment with the columns of the real one, made up: arms move as their strength says."""
    r = np.random.default_rng(0)
    ids = list(CITIES)
    pairs = [(s, t) for s in ids for t in ids if s != t]
    pairs = [pairs[i] for i in r.permutation(len(pairs))[:n]]
    moves = STRENGTH | (strength or {})
    arms = [("none", 0.0), *((a, s) for s in shares for a in ("edit", *controls))]
    luck = r.uniform(size=n)
    rows = [
        _row(r, *pair, arm, share, moves.get(arm, 0) * min(1, 1.5 * share), luck[i])
        for arm, share in arms
        for i, pair in enumerate(pairs)
    ]
    truths = ["to_country", "own_country", "moved", "kept"]
    table = pd.DataFrame(rows).astype(dict.fromkeys(truths, "boolean"))
    said: dict[str, object] = {
        "model": "hf:org/small-lm", "data": "cities.csv", "run": "runs/lm", "site": "lm.layers.7",
        "pool": "last", "prompt": "The city of {name} is in", "role": "last", "phase": "both",
        "mode": "swap", "shares": list(shares), "ranking": "coef_std", "controls": list(controls),
        "left_out": {}, "read_at": "lm.layers.20", "names": {"country": "country"},
        "level": "country", "keep": "known", "protocol": "corrected", "seed": 0,
        "pairs": {
            "asked": n + 12, "kept": n,
            "left_out": {"unedited, the model does not name the source's country": 12},
        },
        "samples": {
            i: {
                "names": {"place": [name], "country": ALIASES.get(country, [country])},
                "answer": f"{country}. It is a city by the sea.",
            }
            for i, (name, country, _, _) in CITIES.items()
        },
        "device": "cpu", "dtype": "float32",
    }  # fmt: skip
    return Steered(table, summarise(table), said | info)


def _row(
    r: np.random.Generator, source: str, target: str, arm: str, share: float, pull: float, u: float
) -> dict[str, object]:
    (_, own, *here), (_, other, *there) = CITIES[source], CITIES[target]
    moved, lost = u < pull, u < pull * 1.3
    named = other if moved else "a land of rivers" if lost else own
    start, end = np.array(here), np.array(there)
    step = (end - start + [0, 180]) % 360 - [0, 180]
    step[0] = end[0] - start[0]
    at = start + np.clip(pull * 1.2, 0, 1) * step + r.normal(size=2) * 8
    return {
        "source": source, "target": target, "arm": arm, "share": share,
        "answer": f"{named}. It is a city by the sea, and its people speak many languages.",
        "to_country": moved, "own_country": not lost, "moved": moved, "kept": not lost,
        "log_odds": -6 + 9 * pull + r.normal(),
        "km": float(great_circle_km(*end, np.clip(at[0], -90, 90), at[1])),
        "kl": 0.0 if arm == "none" else 0.6 * share + 0.4 * pull + 0.1 * abs(r.normal()),
        "perplexity": 4 + 3 * pull + abs(r.normal()), "repetition": 0.02 + 0.1 * pull,
        "stability": 1 - 0.5 * pull,
        "source_latitude": here[0], "source_longitude": here[1],
        "target_latitude": there[0], "target_longitude": there[1],
        "reading_latitude": at[0], "reading_longitude": at[1],
    }  # fmt: skip


if __name__ == "__main__":  # to look at the pages: python tests/test_report_steering.py FOLDER
    out = Path(sys.argv[1])
    for name, made in {"several": example(), "one": example(shares=(0.4,))}.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        steering.write(made, out / name)
