"""The picture of patching: what its title claims, what is drawn, and when there is none."""

import json
import sys

import numpy as np
import pandas as pd
import pytest
import tiny
from PIL import Image

import geofast as gf
from geofast.effects.patching import Patched
from geofast.report import patching as report

SITES = ["lm.embed", *(f"lm.layers.{i}" for i in range(4))]


def made(shares, *, sites=SITES, target_effect=3.0, words=None, beside=0.1):
    """What `patching` found, of shares by token, a share a site; None where a token is not."""
    rows = [
        {
            "site": site, "token": token, "effect": 3 * share, "effect_low": 0.0,
            "effect_high": 9.0, "restored": share, "restored_low": share - beside,
            "restored_high": share + beside,
        }
        for token, column in shares.items()
        for site, share in zip(sites, column, strict=True)
        if share is not None
    ]  # fmt: skip
    info = {
        "tokens": [*shares], "words": words or {}, "target_effect": target_effect,
        "pairs": {"asked": 3, "used": 3, "alike": 0},
    }  # fmt: skip
    return Patched(pd.DataFrame(rows), info)


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        (
            {"last": [0, 0, 0.1, 0.5, 1], 3: [1, 0.9, 0.6, 0.4, 0]},
            "token 3 (Paris …) up to lm.layers.1; the last token from lm.layers.2 on",
        ),
        ({"text": [0.1, 0.6, 0.7, 0.1, 0]}, "text tokens from lm.layers.0 to lm.layers.1"),
        (
            {"text": [0.1, 0.6, 0.1, 0.8, 0]},
            "text tokens at 2 sites from lm.layers.0 to lm.layers.2",
        ),
        ({"text": [0.1, 0.6, 0.1, 0.2, 0]}, "text tokens at lm.layers.0"),
        ({"all": [1] * 5, "last": [0, 0, 0, 0, 1]}, "the last token at lm.layers.3"),
        ({"all": [1] * 5}, "all tokens at every site"),
        ({"image": [None, None, 1, 1, 0.2]}, "image tokens up to lm.layers.2"),
        (
            {i: [0, 0, 0, 0.1 * i, 0.1 * i] for i in range(5, 11)},
            "token 10 from lm.layers.2 on; token 9 from lm.layers.2 on; token 8 from lm.layers.2 on"
            "; token 7 from lm.layers.2 on; 2 more tokens somewhere",
        ),
    ],
)
def test_the_title_says_where_half_is_restored(shares, said):
    title = report.finding(made(shares, words={3: "Paris …"}))
    assert title == f"Half of the change of answer or more is restored by {said}"


def test_the_title_claims_nothing_that_is_not_there():
    few = {0: [0.1, 0.2, 0, 0, 0], 1: [0, 0, 0.49, -3, 0], "all": [1] * 5}
    assert report.finding(made(few)) == (
        "None of these tokens restores half of the change of answer; the most is 49.0 %, by token "
        "1 at lm.layers.1"
    )
    for nothing in (0.0, -1.0, float("nan")):
        assert "shares mean little" in report.finding(made(few, target_effect=nothing))


def test_a_line_a_role_with_its_band():
    sites = ["vision.embed", "projector", "lm.embed", "lm.layers.0", "lm.layers.1"]
    shares = {"patch": [0.8, 0.9, None, None, None], "last": [None, None, 0, -0.3, 1]}
    figure = report.curves(made(shares, sites=sites))
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    np.testing.assert_array_equal(lines["patch"].get_ydata(), [0.8, 0.9, *[np.nan] * 3])
    np.testing.assert_array_equal(lines["last"].get_ydata(), [np.nan, np.nan, 0, -0.3, 1])
    ends = axes.collections[1].get_datalim(axes.transData).intervaly
    np.testing.assert_allclose(ends, [-0.4, 1.1])
    low, high = axes.get_ylim()
    assert -0.5 < low < -0.3
    assert 1.1 <= high < 1.3
    between = [x for line in axes.lines if len(x := line.get_xdata()) == 2 and x[0] == x[1]]
    assert [x[0] for x in between] == [0.5, 1.5]  # towers are parted
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["patch", "last", "95 % over pairs"]
    assert axes.get_xticklabels()[0].get_text() == sites[-1]


def test_a_row_a_position_with_what_stands_there():
    shares = {0: [0.1, 0, 0, 0, 0], 1: [1, 0.9, 2.5, 0.4, -0.2], "last": [0, 0, 0, 0.2, 1]}
    figure = report.curves(made(shares, words={0: "The", 1: "Paris …"}))
    roles, places, _bar = figure.axes
    assert roles.lines[0].get_label() == "last"
    (image,) = places.images
    np.testing.assert_array_equal(image.get_array(), [shares[0], shares[1]])
    assert image.get_clim() == (-1, 1)
    assert [label.get_text() for label in places.get_yticklabels()] == ["0 The", "1 Paris …"]
    assert image.colorbar.extend == "both"
    alone = report.curves(made({0: [0.1, 0, 0, 0, 0.4]}))
    (image,) = alone.axes[0].images
    assert image.get_clim() == (-0.4, 0.4)
    assert image.colorbar.extend == "neither"


def test_shares_of_no_change_at_all_are_drawn_as_missing():
    shares = {"last": [np.inf, -np.inf, np.nan, 0.0, 0.0], 0: [np.inf, np.nan, 0.0, 0.0, 0.0]}
    figure = report.curves(made(shares, target_effect=0.0))
    line = next(line for line in figure.axes[0].lines if line.get_label() == "last")
    np.testing.assert_array_equal(line.get_ydata(), [np.nan] * 3 + [0, 0])


@pytest.fixture(scope="module")
def found():
    model = gf.load(tiny.llama(), processor=tiny.tokenizer())
    sources, targets = ["w1 w2 w3", "w4 w2 w6"], ["w7 w2 w9", "w10 w2 w9"]
    names = [("w60", "w61"), ("w62", "w63")]
    return gf.patching(model, sources, targets, names, tokens=["last", 0, 1, 2, -3])


def test_saved_with_its_picture(found, tmp_path):
    assert found.save(tmp_path / "made") == tmp_path / "made"
    files = sorted(path.name for path in (tmp_path / "made").iterdir())
    assert files == ["patching.csv", "patching.json", "patching.png"]
    with Image.open(tmp_path / "made/patching.png") as image:
        assert image.width == 1600
        assert len(image.convert("RGB").getcolors(1 << 16)) > 50
    info = json.loads((tmp_path / "made/patching.json").read_text())
    assert info["words"] == {"0": "w1 …", "1": "w2", "2": "w3 …", "-3": "w1 …"}
    assert "warnings" not in info


def test_without_matplotlib_all_but_the_picture_is_written(found, tmp_path, monkeypatch):
    for name in [m for m in sys.modules if m.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "patching.png").write_bytes(b"an older one")
    again = Patched(found.table, dict(found.info))
    with pytest.warns(UserWarning, match="no pictures: figures need matplotlib"):
        again.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["patching.csv", "patching.json"]
    info = json.loads((tmp_path / "patching.json").read_text())
    assert "pip install matplotlib" in info["warnings"][0]
