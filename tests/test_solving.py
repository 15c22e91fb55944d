from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import tiny
import torch

import geofast as gf
from geofast.data import Samples, from_arrays
from geofast.extract import Extracted
from geofast.models.inputs import text_collate
from geofast.solving import far_out

SITES = ("lm.layers.0/last/{name}", "lm.layers.1/last/{name}", "lm.layers.1/last/In {name}")


def found(n: int = 40, keys: Sequence[str] = SITES) -> Extracted:
    torch.manual_seed(0)
    unit = torch.nn.functional.normalize
    return Extracted(np.arange(n), {key: unit(torch.randn(n, 8)) for key in keys}, None)


def samples(n: int = 40, kind: Literal["text", "image"] = "text") -> Samples:
    names = [f"town {i}" if kind == "text" else Path(f"{i}.jpg") for i in range(n)]
    return from_arrays(names, np.linspace(-60, 60, n), np.linspace(-170, 170, n))


def stretch(one: Extracted, key: str, i: int, times: float) -> None:
    assert one.rows is not None
    one.rows[key][i] *= times


def test_rows_far_longer_than_the_others_are_warned_of() -> None:
    one = found()
    assert far_out(one, samples()) == []
    stretch(one, SITES[0], 7, 19.9)
    assert far_out(one, samples()) == []
    stretch(one, SITES[0], 29, 150)
    stretch(one, SITES[1], 29, 121)
    (said,) = far_out(one, samples())
    assert said == (
        "1 of 40 samples has a row more than 20 times as long as the median row, up to 150 times, "
        "at 2 sites (pool last, prompt '{name}'): arrays, id 29 ('town 29'). Such a row can "
        "decide an R²: put words before the text in the prompt, or leave the sample out"
    )


def test_of_many_long_rows_the_first_are_named_and_the_others_counted() -> None:
    one = found(keys=["vision.layers.0/cls", "vision.layers.0/max:patch"])
    for i in range(5):
        stretch(one, "vision.layers.0/cls", 3 * i, 25)
    stretch(one, "vision.layers.0/max:patch", 0, 30)
    (said,) = far_out(one, samples(kind="image"))
    assert said == (
        "5 of 40 samples have a row more than 20 times as long as the median row, up to 30 times, "
        "at 1 site (pools cls, max:patch): 0.jpg, 3.jpg, 6.jpg and 2 more. Such a row can "
        "decide an R²: leave the samples out"
    )


def test_rows_of_zeros_and_statistics_are_not_warned_of() -> None:
    one = found()
    assert one.rows is not None
    for x in one.rows.values():
        x[:30] = 0
    assert far_out(one, samples()) == []
    assert far_out(Extracted(np.arange(40), None, {}), samples()) == []


def test_a_run_has_the_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """A last token whose embedding is long, as a first token's row is."""
    model = tiny.llama()
    model.get_input_embeddings().weight.data[2 + 90] *= 1e4
    names = [f"w{i % 7} w{i % 11}" for i in range(40)]
    words = from_arrays(names, np.linspace(-60, 60, 40), np.linspace(-170, 170, 40))
    loaded = gf.load(model, prepare=text_collate(tiny.tokenizer(), model.base_model))
    assert "as long as" not in str(gf.probe(loaded, words).info["warnings"])
    words = replace(words, inputs=["w90", *names[1:]])

    def slow(*args: Any) -> list[str]:
        time.sleep(0.5)
        return far_out(*args)

    monkeypatch.setattr(import_module("geofast.probe"), "far_out", slow)
    run = gf.probe(loaded, words, alphas=[1.0])
    assert run.info["seconds"]["solve"] > 0.5  # the time that it takes is told
    said = str(run.info["warnings"])
    assert "1 of 40 samples has a row more than 20 times as long as the median" in said
    assert "arrays, id 0 ('w90')" in said
