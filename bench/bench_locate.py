"""A sweep of sites and shares against the same runs one pair and one setting at a time.

SmolLM2-135M on the CPU. The loop beside it runs, for every pair, site and share, the target for its
state, the source as it is, and the source under the edit and under that of random dimensions, each
time the whole prompt.
"""

import time
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
import torch

import geofast as gf
from geofast.data import demos, from_arrays
from geofast.effects.dims import ranked_dims
from geofast.effects.locate import locate
from geofast.run import key

pytestmark = pytest.mark.assets

PAIRS, LOOPED = 40, 2
SITES = tuple(f"lm.layers.{i}" for i in range(0, 30, 5))
SHARES = (0.1, 0.4)
SEED = 0
PLACES = {
    "Paris": "France", "Tokyo": "Japan", "Cairo": "Egypt", "Lima": "Peru", "Oslo": "Norway",
    "Delhi": "India", "Rome": "Italy", "Quito": "Ecuador", "Accra": "Ghana", "Hanoi": "Vietnam",
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return gf.load(demos.smollm2(), device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def samples():
    texts = [f"The city of {city} is in the country of" for city in PLACES]
    n = len(PLACES)
    return from_arrays(
        texts, np.linspace(-40, 60, n), np.linspace(-70, 140, n), name=[*PLACES.values()]
    )


def run_of(model, width=576):
    """A run whose probes nobody fitted: what ranks the dimensions takes no part in the time."""
    generator = torch.Generator().manual_seed(SEED)
    probes = {}
    for site in SITES:
        coef = torch.randn(width, 2, generator=generator, dtype=torch.float64)
        zero, targets = torch.zeros(2, dtype=torch.float64), ("latitude", "longitude")
        probes[key(site, "last")] = gf.Probe(site, "last", "", targets, 1.0, coef, zero)
    layers = pd.DataFrame({"site": SITES, "pool": "last", "split": "kfold", "r2": 0.5})
    return gf.Run({"model": model.name}, layers, pd.DataFrame(), probes)


def pairs_of(samples, n):
    ids, m = samples.table["id"], len(samples)
    both = [(i % m, (i * 7 + 3 + i // m) % m) for i in range(n)]
    both = [(a, b if b != a else (b + 1) % m) for a, b in both]
    return pd.DataFrame({"source": [ids[a] for a, _ in both], "target": [ids[b] for _, b in both]})


@contextmanager
def hooked(layer, hook):
    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.inference_mode()
def looped(model, samples, run, pairs):
    """By site, share and pair: effect and damage of the edit and of random dimensions."""
    tokenizer = model.collate.tokenizer
    table = samples.table.set_index("id")
    texts = dict(zip(table.index, samples.inputs, strict=True))
    generator = torch.Generator().manual_seed(SEED)
    made = {}

    def next_token(text):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        logits = model.module(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        return logits[0, -1].double().log_softmax(0)

    for site in SITES:
        layer = model.sites(site)[0].module
        order = ranked_dims(run, key(site, "last"), "coef")
        random = torch.randperm(len(order), generator=generator)
        for share in SHARES:
            m = round(share * len(order))
            for i, (source, target) in enumerate(pairs.itertuples(index=False)):
                kept = []
                with hooked(layer, lambda _m, _a, out, kept=kept: kept.append(out[0, -1].clone())):
                    next_token(texts[target])
                names = [f" {table.loc[one, 'name']}" for one in (source, target)]
                two = [tokenizer(name)["input_ids"][0] for name in names]
                before, row = next_token(texts[source]), []
                for dims in (order[:m], random[:m]):

                    def write(_m, _a, out, dims=dims, held=kept[0]):
                        out[0, -1, dims] = held[dims]
                        return out

                    with hooked(layer, write):
                        after = next_token(texts[source])
                    odds = (logs[two[1]] - logs[two[0]] for logs in (after, before))
                    others = torch.ones_like(before, dtype=torch.bool)
                    others[two] = False
                    p, q = (x[others].log_softmax(0) for x in (before, after))
                    row += [float(next(odds) - next(odds)), float((p.exp() * (p - q)).sum())]
                made[site, share, i] = row
    return made


def test_sweep(benchmark, model, samples):
    benchmark.group = f"locate: {PAIRS} pairs, {len(SITES)} sites, {len(SHARES)} shares"
    run, options = run_of(model), dict(names="name", shares=SHARES, ranking="coef", seed=SEED)
    few = pairs_of(samples, LOOPED)
    start = time.perf_counter()
    slow = looped(model, samples, run, few)
    one = (time.perf_counter() - start) / LOOPED
    found = locate(model, samples, few, run, **options).table
    columns = ["effect", "damage", "random_effect", "random_damage"]
    for _, row in found.iterrows():
        each = [slow[row["site"], row["share"], i] for i in range(LOOPED)]
        np.testing.assert_allclose(row[columns].astype(float), np.mean(each, 0), atol=1e-3)
    assert found["effect"].abs().max() > 0.1

    pairs = pairs_of(samples, PAIRS)
    start = time.perf_counter()
    locate(model, samples, pairs, run, **options)
    quick = time.perf_counter() - start
    benchmark.extra_info["one at a time"] = f"{one * PAIRS:.0f} s (from {LOOPED} pairs)"
    benchmark.extra_info["times quicker"] = f"{one * PAIRS / quick:.1f}"
    benchmark.pedantic(locate, (model, samples, pairs, run), options, rounds=1)
