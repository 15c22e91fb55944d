import errno
import os
import re
from importlib import import_module

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from scipy.stats import spearmanr
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score
from sklearn.model_selection import KFold

import geofast as gf
from geofast.data import from_arrays
from geofast.models.inputs import text_collate
from geofast.models.twin import random_twin


def painted(n=60, seed=0):
    """Images whose colours say where they are."""
    r = np.random.default_rng(seed)
    lat, lon = r.uniform(-80, 80, n), r.uniform(-170, 170, n)
    images = r.integers(0, 60, (n, 28, 28, 3))
    images[..., 0] += ((lat + 90) / 180 * 190).astype(int)[:, None, None]
    images[..., 1] += ((lon + 180) / 360 * 190).astype(int)[:, None, None]
    return from_arrays(
        list(images.astype(np.uint8)), lat, lon, zone=np.where(lat > 0, "north", "south")
    )


def pixels(images):
    stacked = np.stack([np.asarray(image) for image in images])
    return {"pixel_values": torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 128 - 1}


@pytest.fixture(scope="module")
def vision():
    return gf.load(tiny.dinov2(), prepare=pixels)


@pytest.fixture(scope="module")
def run(vision):
    return gf.probe(
        vision,
        painted(),
        pool=["cls", "mean:patch"],
        split=[gf.KFold(), gf.Blocks(30)],
        batch_size=7,
    )


def the_studys(x, y, fold):
    """A row of layers.csv and the held-out predictions, by scikit-learn and SciPy."""
    held, alphas, by_fold = np.empty_like(y), [], []
    for f in range(fold.max() + 1):
        test = fold == f
        model = RidgeCV(alphas=gf.ALPHAS).fit(x[~test], y[~test])
        held[test] = model.predict(x[test])
        alphas.append(model.alpha_)
        scores = {}
        for i, name in enumerate(("latitude", "longitude")):
            truth, guess = y[test, i], held[test, i]
            scores[f"r2_{name}"] = r2_score(truth, guess)
            scores[f"rmse_{name}"] = mean_squared_error(truth, guess) ** 0.5
            scores[f"mae_{name}"] = mean_absolute_error(truth, guess)
            scores[f"spearman_{name}"] = spearmanr(truth, guess).statistic
        by_fold.append(scores)
    columns = pd.DataFrame(by_fold).mean().to_dict()
    of_mean = pd.DataFrame(by_fold).sem()
    columns |= {f"r2_se_{name}": of_mean[f"r2_{name}"] for name in ("latitude", "longitude")}
    r2 = [(s["r2_latitude"] + s["r2_longitude"]) / 2 for s in by_fold]
    columns |= {"r2": np.mean(r2), "r2_se": np.std(r2, ddof=1) / len(r2) ** 0.5}
    km = kilometres(y, held)
    columns |= {"mean_km": km.mean(), "median_km": np.median(km)}
    columns["alpha"] = np.exp(np.log(alphas).mean())
    return columns, held


def kilometres(truth, guess):
    """Great-circle distance through unit vectors; a guessed latitude stops at the pole."""
    guess = np.column_stack([guess[:, 0].clip(-90, 90), guess[:, 1]])
    (a, b), (c, d) = np.radians(truth).T, np.radians(guess).T
    cosine = np.sin(a) * np.sin(c) + np.cos(a) * np.cos(c) * np.cos(b - d)
    return 6371.0088 * np.arccos(cosine.clip(-1, 1))


def test_the_table_is_the_studys(vision, run):
    samples = painted()
    with gf.capture(vision, "vision.layers.1", "mean:patch") as rows:
        vision.forward(vision.prepare([samples.load(i) for i in range(60)]))
    x = rows["vision.layers.1/mean:patch"].double().numpy()
    y = samples.table[["latitude", "longitude"]].to_numpy()
    fold = np.empty(60, int)
    for f, (_, test) in enumerate(KFold(5, shuffle=True, random_state=42).split(x)):
        fold[test] = f
    expected, _ = the_studys(x, y, fold)
    row = run.layers.query(
        "site == 'vision.layers.1' and pool == 'mean:patch' and split == 'kfold'"
    ).iloc[0]
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert row["r2"] > 0.8
    assert (row["n"], row["d"], row["layer"], row["tower"]) == (60, 32, 1, "vision")
    words = {"site", "tower", "layer", "pool", "prompt", "group", "split", "control", "n", "d"}
    assert set(run.layers) == words | expected.keys()


@pytest.mark.parametrize("split", ["kfold", "blocks30"])
def test_predictions_are_those_of_the_best_probe(run, split):
    best = run.rows_of(split).sort_values("r2").iloc[-1]
    x = run.rows[f"{best['site']}/{best['pool']}"].double().numpy()
    y = run.samples[["latitude", "longitude"]].to_numpy()
    fold = run.samples[f"fold_{split}"].to_numpy()
    expected, held = the_studys(x, y, fold)
    assert {name: best[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)
    told = run.predictions.query(f"split == '{split}'").set_index("id").loc[run.samples["id"]]
    assert len(told) == 60
    assert set(told["site"]) == {best["site"]}
    assert set(told["pool"]) == {best["pool"]}
    np.testing.assert_array_equal(told["fold"], fold)
    np.testing.assert_array_equal(told[["latitude", "longitude"]], y)
    guess = told[["latitude_predicted", "longitude_predicted"]]
    np.testing.assert_allclose(guess, held, atol=1e-3)
    np.testing.assert_allclose(told["error_km"], kilometres(y, held), rtol=1e-5, atol=0.1)


def test_every_site_pool_and_split_has_a_row(run):
    assert len(run.layers) == 4 * 2 * 2
    assert set(run.layers["split"]) == {"kfold", "blocks30"}
    assert run.layers["median_km"].notna().all()
    assert len(run.probes) == 8
    assert set(run.predictions["split"]) == {"kfold", "blocks30"}
    assert {"fold_kfold", "fold_blocks30"} <= set(run.samples)
    assert run.info["counts"] == {"read": 60, "skipped": 0, "why": []}
    assert "loo" in run.info["methods"][0]


def test_probes_predict(run):
    probe = run.best
    key = f"{probe.site}/{probe.pool}"
    guess = probe(run.rows[key].numpy())
    assert r2_score(run.samples[["latitude", "longitude"]], guess) > 0.9


def test_statistics_alone_find_the_same(vision, run):
    found = gf.probe(
        vision,
        painted(),
        pool=["cls", "mean:patch"],
        split=[gf.KFold(), gf.Blocks(30)],
        storage="gram",
    )
    both = gf.probe(
        vision,
        painted(),
        pool=["cls", "mean:patch"],
        split=[gf.KFold(), gf.Blocks(30)],
        select="gcv",
        storage="rows",
    )
    assert found.rows is None
    assert "median_km" not in found.layers
    assert "mae_latitude" not in found.layers
    pd.testing.assert_frame_equal(found.layers, both.layers[found.layers.columns], rtol=1e-5)
    assert found.info["honest"]["kfold"]["site"] == both.info["honest"]["kfold"]["site"]
    with pytest.raises(ValueError, match=r"select='loo' \(--select\) needs rows"):
        gf.probe(vision, painted(), storage="gram", select="loo")


def test_samples_that_come_again_in_another_fold_are_told(vision):
    once = painted(20)
    images, places = [*once.inputs], once.table[["latitude", "longitude"]].to_numpy()
    again = from_arrays(images * 2, *np.tile(places, (2, 1)).T, scene=[*map(str, range(20))] * 2)
    site = "vision.layers.1"
    apart = gf.probe(vision, again, sites=site, split=gf.KFold(5), check=False)
    fold = apart.samples["fold_kfold"].to_numpy()
    count = 2 * int((fold[:20] != fold[20:]).sum())
    (told,) = [w for w in apart.info["warnings"] if "same input" in w]
    assert told.startswith(f"{count} of 40 samples have the same input and place as one in another")
    together = gf.probe(vision, again, sites=site, split="group:scene", check=False)
    elsewhere = from_arrays(images * 2, *np.concatenate([places, places + 1]).T)
    for run in (together, gf.probe(vision, elsewhere, sites=site, check=False)):
        assert not [w for w in run.info["warnings"] if "same input" in w]


def test_groups_are_probed_on_their_own(vision):
    found = gf.probe(vision, painted(), sites="vision.layers.2", group="zone")
    assert set(found.layers["group"]) == {"", "north", "south"}
    samples = painted()
    north = np.flatnonzero(samples.table["zone"] == "north")
    alone = gf.probe(vision, samples.take(north), sites="vision.layers.2")
    row = found.layers.query("group == 'north'").iloc[0]
    assert row["r2"] == pytest.approx(alone.layers["r2"].iloc[0], abs=1e-6)
    assert row["n"] == len(north)
    summed = gf.probe(vision, samples, sites="vision.layers.2", group="zone", storage="gram")
    again = gf.probe(vision, samples, sites="vision.layers.2", group="zone", select="gcv")
    pd.testing.assert_frame_equal(summed.layers, again.layers[summed.layers.columns], rtol=1e-4)


def test_alpha_is_that_of_the_folds_where_they_agree(vision):
    options = {"sites": "vision.layers.*", "select": "gcv"}
    one = gf.probe(vision, painted(), alphas=[0.3], **options)
    assert set(one.layers["alpha"]) == {0.3}
    grid = [1e-4, 2e-4, 4e-4, 8e-4]
    many = gf.probe(vision, painted(), alphas=grid, **options)
    y = torch.tensor(many.samples[["latitude", "longitude"]].to_numpy())
    fold = torch.tensor(many.samples["fold_kfold"].to_numpy())
    for row, x in zip(many.layers.to_dict("records"), many.rows.values(), strict=True):
        chosen = gf.cross_validate(x, y, fold, grid, select="gcv").alpha.tolist()
        assert row["alpha"] == pytest.approx(np.prod(chosen) ** 0.2, rel=1e-12)
        assert len(set(chosen)) > 1 or row["alpha"] == chosen[0]
    assert not set(many.layers["alpha"]) <= set(grid)


def test_a_table_is_not_taken_for_samples(vision):
    with pytest.raises(TypeError, match=r"data must be a path or samples; got a DataFrame"):
        gf.probe(vision, painted().table)


def test_baselines_stand_beside(vision):
    noise = torch.randn(60, 10, generator=torch.Generator().manual_seed(0)).numpy()
    found = gf.probe(
        vision, painted(), sites="vision.layers.1", pool="mean:patch", baselines={"noise": noise}
    )
    control = found.layers.query("control == 'noise'").iloc[0]
    assert control["r2"] < 0.2
    assert found.layers.query("control == ''")["r2"].iloc[0] > 0.8
    assert found.best.site == "vision.layers.1"


def test_bad_samples_are_counted_and_left_out(vision, tmp_path):
    samples = painted(40)
    rows = []
    for i in range(40):
        samples.load(i).save(tmp_path / f"{i}.png")
        rows.append(
            {
                "image": f"{i}.png",
                "latitude": samples.table["latitude"][i],
                "longitude": samples.table["longitude"][i],
            }
        )
    (tmp_path / "7.png").write_bytes((tmp_path / "7.png").read_bytes()[:200])
    rows[9]["latitude"] = 91
    pd.DataFrame(rows).to_csv(tmp_path / "photos.csv", index=False)
    found = gf.probe(vision, tmp_path / "photos.csv", workers=1)
    assert found.info["counts"]["read"] == 38
    assert found.info["counts"]["skipped"] == 2
    assert any("7.png" in why for why in found.info["counts"]["why"])
    assert len(found.samples) == len(found.rows["vision.embed/cls"]) == 38
    keep = [i for i in range(40) if i not in (7, 9)]
    clean = gf.probe(vision, samples.take(np.array(keep)))
    np.testing.assert_allclose(found.layers["r2"], clean.layers["r2"], atol=1e-6)
    with pytest.raises(ValueError, match=r"photos\.csv row 10: latitude 91"):
        gf.probe(vision, tmp_path / "photos.csv", strict=True)
    rows[9]["latitude"] = 9
    pd.DataFrame(rows).to_csv(tmp_path / "photos.csv", index=False)
    with pytest.raises(ValueError, match=r"7\.png"):
        gf.probe(vision, tmp_path / "photos.csv", strict=True)


def test_statistics_keep_their_folds_when_samples_are_skipped(vision):
    """The published folds and groups are those that the numbers come from."""
    whole = painted()
    images = [whole.load(i) for i in range(60)]
    bad = [*range(5), 17]
    samples = from_arrays(
        [b"no image" if i in bad else image for i, image in enumerate(images)],
        whole.table["latitude"], whole.table["longitude"],
        zone=["a"] * 5 + ["b"] * 25 + ["c"] * 30,
    )  # fmt: skip
    found = gf.probe(
        vision, samples, sites="vision.layers.2", storage="gram", group="zone",
        split=gf.KFold(2),
    )  # fmt: skip
    assert set(found.layers["group"]) == {"", "b", "c"}
    warned = found.info["warnings"][0]
    assert re.fullmatch(r"Groups left out: a \(kfold\); the first, because .*[^.]", warned)
    good = [i for i in range(60) if i not in bad]
    with gf.capture(vision, "vision.layers.2") as rows:
        vision.forward(vision.prepare([images[i] for i in good]))
    x = rows["vision.layers.2/cls"]
    y = torch.tensor(whole.table[["latitude", "longitude"]].to_numpy()[good])
    folds = torch.tensor(found.samples["fold_kfold"].to_numpy())
    expected = gf.cross_validate(x, y, folds, select="gcv").r2.mean().item()
    assert found.layers.query("group == ''")["r2"].item() == pytest.approx(expected, abs=1e-5)
    for zone, start, stop in (("b", 5, 30), ("c", 30, 60)):
        fold = gf.KFold(2).assign(samples.table.iloc[start:stop])
        of = {i: f for i, f in zip(range(start, stop), fold, strict=True) if i not in bad}
        member = torch.tensor([good.index(i) for i in of])
        alone = gf.cross_validate(x[member], y[member], torch.tensor([*of.values()]), select="gcv")
        row = found.layers.query(f"group == '{zone}'").iloc[0]
        assert row["r2"] == pytest.approx(alone.r2.mean().item(), abs=1e-5)
        assert row["n"] == len(of)


@pytest.fixture(scope="module")
def language():
    module = tiny.llama()
    return gf.load(module, prepare=text_collate(tiny.tokenizer(), module.base_model))


def named(n=40):
    r = np.random.default_rng(1)
    words = [f"w{i} w{(7 * i) % 90}" + " w3" * int(i % 4) for i in range(n)]
    return from_arrays(
        words,
        r.uniform(-80, 80, n),
        r.uniform(-170, 170, n),
        country=[f"w{i % 5}" for i in range(n)],
    )


def test_prompts_and_order(language):
    """Batches go longest first; rows come back in the order of the samples."""
    found = gf.probe(language, named(), prompts=["{text}", "w9 {text} w8 {country}"], batch_size=3)
    assert set(found.layers["prompt"]) == {"{text}", "w9 {text} w8 {country}"}
    samples = named()
    with gf.capture(language) as rows:
        for i in range(40):
            text = f"w9 {samples.load(i)} w8 {samples.table['country'][i]}"
            language.forward(language.prepare([text]))
    torch.testing.assert_close(
        found.rows["lm.layers.2/last/w9 {text} w8 {country}"],
        rows["lm.layers.2/last"],
        atol=2e-6,
        rtol=1e-5,
    )


@pytest.mark.parametrize("prompts", [None, ["{text}", "w9 {text} w8 {country}"]])
def test_rows_on_disk_are_those_in_memory(language, monkeypatch, tmp_path, prompts):
    options = {"prompts": prompts, "storage": "rows", "batch_size": 7}
    inside = gf.probe(language, named(), **options)
    monkeypatch.setattr(import_module("geofast.plan"), "_MEMORY_SHARE", 0)
    outside = gf.probe(language, named(), scratch=tmp_path, **options)
    assert "pooled rows on disk" in outside.info["storage"]
    pd.testing.assert_frame_equal(outside.layers, inside.layers, check_exact=True)
    pd.testing.assert_frame_equal(outside.predictions, inside.predictions, check_exact=True)
    for name, probe in inside.probes.items():
        assert torch.equal(outside.probes[name].coef, probe.coef)
    assert list(tmp_path.iterdir()) == []


def test_no_room_for_rows_is_told_before_the_pass(language, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(import_module("geofast.plan"), "_MEMORY_SHARE", 0)
    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(import_module("geofast.probe"), "extract", None)
    needed = f"{4 * 40 * 4 * 32:,} bytes of pooled rows in {tmp_path}"
    with pytest.raises(OSError, match=needed):
        gf.probe(language, named(), storage="rows", scratch=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_texts_that_cannot_be_used_are_counted(language):
    samples = named()
    texts = [*samples.inputs]
    texts[3], texts[30] = " ", "w1 " * 70
    options = {"prompts": ["{text}", "w9 {text}"], "sites": "lm.layers.2"}
    table = samples.table
    bad = from_arrays(texts, table["latitude"], table["longitude"])
    with pytest.raises(ValueError, match=r"arrays, id 3: the text ' ' has no token"):
        gf.probe(language, bad, sites="lm.layers.2", strict=True)
    kept = [i for i in range(40) if i not in (3, 30)]
    clean = gf.probe(language, samples.take(kept), **options)
    for storage in ("rows", "gram"):
        found = gf.probe(language, bad, storage=storage, select="gcv", **options)
        assert found.info["counts"]["read"] == 38
        assert found.info["counts"]["skipped"] == 2
        assert "has 70 tokens; the model takes 64" in found.info["counts"]["why"][1]
        folds = found.samples["fold_kfold"].to_numpy()
        np.testing.assert_array_equal(folds, clean.samples["fold_kfold"])


@pytest.mark.parametrize("storage", ["rows", "gram"])
def test_infinite_activations_name_the_file(vision, tmp_path, storage):
    samples = painted(20)
    paths = []
    for i in range(20):
        paths.append(tmp_path / f"{i}.png")
        samples.load(i).save(paths[-1])
    data = from_arrays(paths, samples.table["latitude"], samples.table["longitude"])

    def spoiled(which):
        def prepare(images):
            batch = pixels(images)
            for i, image in enumerate(images):
                if np.array_equal(image, samples.load(which)):
                    batch["pixel_values"][i] = np.inf
            return batch

        return gf.load(vision.module, prepare=prepare)

    for which in (0, 13):  # the first is met by the run that plans
        pattern = rf"NaN or infinite activations in float32.* That is .*/{which}\.png"
        with pytest.raises(FloatingPointError, match=pattern):
            gf.probe(spoiled(which), data, storage=storage)


def test_one_string_is_one_prompt_and_one_target(language):
    found = gf.probe(
        language, named(), sites="lm.layers.2", prompts="w9 {text}", targets="latitude"
    )
    listed = gf.probe(
        language, named(), sites="lm.layers.2", prompts=["w9 {text}"], targets=["latitude"]
    )
    assert found.targets == ("latitude",)
    assert found.info["arguments"]["prompts"] == ["w9 {text}"]
    assert len(found.layers) == 1
    pd.testing.assert_frame_equal(found.layers, listed.layers)


def test_run_json_says_how_to_make_the_folds_again(language):
    splits = [gf.KFold(10, seed=1), gf.Blocks(30, 4, seed=7), ShuffledKFold(4, shuffle=True)]
    found = gf.probe(language, named(), sites="lm.layers.2", split=splits)
    assert found.info["arguments"]["split"] == {
        "kfold": "KFold(folds=10, seed=1)",
        "blocks30": "Blocks(degrees=30, folds=4, seed=7)",
        "shuffledkfold": "SklearnSplit(splitter=ShuffledKFold(n_splits=4, random_state=None, "
        "shuffle=True), label='shuffledkfold', groups=None)",
    }
    assert found.info["seeds"] == {"kfold": 1, "blocks30": 7}


class ShuffledKFold(KFold):
    """scikit-learn's, by another name."""


def test_the_honest_best_is_chosen_on_inner_folds(language):
    """Places are random here, so that the inner and the outer folds like different sites."""
    splits = [gf.KFold(), gf.GroupKFold("country")]
    options = {"prompts": ["{text}", "w9 {text}"], "pool": ["last", "mean:text"]}
    found = gf.probe(language, named(), split=splits, alphas=[0.01, 1], **options)
    y = torch.tensor(found.samples[["latitude", "longitude"]].to_numpy())
    for split in found.splits:
        fold = torch.tensor(found.samples[f"fold_{split}"].to_numpy())
        solved = [gf.cross_validate(x, y, fold, [0.01, 1], inner=True) for x in found.rows.values()]
        inner = torch.stack([s.inner_r2.mean(1) for s in solved])
        outer = torch.stack([s.r2.mean(1) for s in solved])
        chosen = inner.argmax(0)
        r2 = outer[chosen, torch.arange(5)].numpy()
        honest = found.info["honest"][split]
        assert honest["chosen"] == [[*found.rows][i] for i in chosen]
        assert honest["r2"] == pytest.approx(r2.mean(), abs=1e-9)
        assert honest["r2_se"] == pytest.approx(r2.std(ddof=1) / 5**0.5, abs=1e-9)
        of_longitude = torch.stack([solved[i].r2[f, 1] for f, i in enumerate(chosen)]).numpy()
        assert honest["r2_longitude"] == pytest.approx(of_longitude.mean(), abs=1e-9)
        se = of_longitude.std(ddof=1) / 5**0.5
        assert honest["r2_se_longitude"] == pytest.approx(se, abs=1e-9)
        named_one = "/".join([honest["site"], honest["pool"], honest["prompt"]])
        count = honest["chosen"].count
        assert count(named_one) == max(map(count, honest["chosen"]))
        # The outer folds would have chosen others, all together as well as each for itself.
        assert honest["r2"] < outer.mean(1).max() - 1e-3
        assert not torch.equal(chosen, outer.argmax(0))


def test_baselines_are_chosen_as_the_rest(vision):
    noise = torch.randn(60, 10, generator=torch.Generator().manual_seed(0))
    found = gf.probe(
        vision, painted(), sites="vision.layers.1", select="folds", baselines={"a/b": noise}
    )
    assert all(method.startswith("folds") for method in found.info["methods"])
    control = found.layers.query("control == 'a/b'").iloc[0]
    assert (control["site"], control["pool"], control["prompt"]) == ("input", "a/b", "")


@pytest.mark.parametrize("storage", ["rows", "gram"])
def test_the_saved_probes_take_alpha_from_the_folds(vision, storage):
    clear, r = painted(), np.random.default_rng(5)
    latitude = clear.table["latitude"] / 2 + r.normal(0, 15, 60)
    longitude = clear.table["longitude"] / 2 + r.normal(0, 30, 60)
    samples = from_arrays([clear.load(i) for i in range(60)], latitude, longitude)
    splits, grid = [gf.Blocks(30), gf.KFold()], [10 ** (e / 4) for e in range(-12, 9)]
    options = {"sites": "vision.layers.*", "pool": "mean:patch", "alphas": grid[::-1]}
    found = gf.probe(vision, samples, split=splits, select="folds", storage=storage, **options)
    rows = gf.probe(vision, samples, storage="rows", select="gcv", **options)
    y = rows.samples[["latitude", "longitude"]].to_numpy()
    fold = found.samples["fold_blocks30"].to_numpy()
    for name, probe in found.probes.items():
        x = rows.rows[name].double().numpy()
        errors = []
        for alpha in grid:
            parts = [(Ridge(alpha).fit(x[fold != f], y[fold != f]), fold == f) for f in range(5)]
            errors.append(np.mean([np.mean((y[t] - m.predict(x[t])) ** 2) for m, t in parts]))
        alpha = grid[int(np.argmin(errors))]
        assert probe.alpha == pytest.approx(alpha, rel=1e-12)
        whole = Ridge(alpha).fit(x, y)
        np.testing.assert_allclose(probe.coef.T, whole.coef_, rtol=1e-3, atol=1e-3)
    assert found.info["final_alpha"].endswith("over the folds of split blocks30")
    assert rows.info["final_alpha"] == "by generalised cross-validation over all samples"
    # GCV would have chosen others.
    assert any(found.probes[name].alpha != rows.probes[name].alpha for name in rows.probes)


def test_group_folds_keep_groups_together(language):
    found = gf.probe(language, named(), split=gf.GroupKFold("country"))
    folds = found.samples.groupby("country")["fold_group:country"].nunique()
    assert (folds == 1).all()


def test_storage_is_chosen_and_said(language, capsys):
    gf.probe(language, named(), progress=True)
    said = capsys.readouterr().out
    assert "keeping pooled rows (chosen: rows need" in " ".join(said.split())
    assert max(map(len, said.splitlines())) <= 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": ["{town}"]}, "names 'town'; the samples have"),
        ({"sites": "vision.*"}, "no site matches 'vision.*'"),
        ({"split": gf.KFold(50)}, "50"),
        ({"split": gf.GroupKFold("region")}, "region"),
        ({"split": []}, "no split was given"),
        ({"split": [gf.KFold(), gf.KFold()]}, "same name: kfold, kfold"),
        ({"targets": ["population"]}, "target 'population' is not a numeric column"),
        ({"group": "region"}, "no column 'region' to group by"),
        ({"storage": "disk"}, "storage must be auto, rows or gram; got 'disk'"),
        ({"pool": "median"}, "unknown pool 'median'"),
        ({"pool": {"vision": "cls"}}, "pool= names a tower 'vision'; LlamaForCausalLM has lm"),
        ({"prompts": ["{text}", "{town}"]}, "names 'town'"),
        ({"split": gf.KFold(40)}, "fold 0 of split 'kfold' has too few samples (1)"),
        ({"split": gf.KFold(2), "select": "folds"}, "needs at least 3 folds, and split 'kfold'"),
        ({"select": "aic"}, "select must be loo, gcv or folds; got 'aic'"),
        ({"alphas": [0, 1]}, "alphas must be positive numbers; got [0.0, 1.0]"),
        ({"alphas": 5.0}, "alphas must be a list of positive numbers; got 5.0"),
        ({"sites": []}, "sites= is empty; give names or globs"),
        ({"alphas": [float("nan")]}, "alphas must be positive numbers; got [nan]"),
        ({"alphas": []}, "alphas must be positive"),
        ({"targets": []}, "targets= (--targets) needs one column or several"),
        ({"baselines": {"b": torch.zeros(45, 4)}}, "baseline 'b' has shape [45, 4] for 40 sampl"),
        ({"baselines": {"b": torch.full((40, 4), torch.nan)}}, "baseline 'b' has NaN"),
    ],
)
def test_bad_arguments(language, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        gf.probe(language, named(), **change)


@pytest.mark.parametrize(
    "change",
    [
        {"prompts": ["{text}", "{town}"]},
        {"split": gf.KFold(40)},
        {"split": gf.KFold(2), "select": "folds"},
        {"select": "loo", "storage": "gram"},
        {"storage": "disk"},
        {"alphas": [-1]},
        {"alphas": 5.0},
        {"alphas": "10"},
        {"sites": []},
        {"batch_size": 0},
        {"workers": -1},
    ],
)
def test_what_can_be_known_is_told_before_the_model_loads(change):
    with pytest.raises(
        ValueError, match=r"(?i)prompt|fold|rows|storage|alphas|batch_size|sites"
    ) as told:
        gf.probe("/no/such/model", named(), **change)
    assert not isinstance(told.value, FileNotFoundError)


def test_a_constant_target_is_named(language):
    samples = from_arrays(["w1", "w2"] * 20, [10.0] * 40, list(range(40)))
    with pytest.raises(ValueError, match=r"target 'latitude' is 10.0 for every sample"):
        gf.probe(language, samples)


def test_images_are_no_text(language):
    message = r"reads text, not image: name the samples' text column \(text=, --text\)"
    with pytest.raises(ValueError, match=message):
        gf.probe(language, painted())


def test_penalties_at_the_edge_of_those_tried_are_warned_of(vision):
    few = gf.probe(vision, painted(), alphas=[1e5, 1e6]).info["warnings"]
    assert few == [
        "alpha is the smallest that was tried, 100000, for 4 of 4 probes: with others in alphas= "
        "(--alphas) their R² may be higher"
    ]
    assert not gf.probe(
        vision, painted(), pool="mean:patch", alphas=[1e-12, 1e-3, 0.1, 10, 1e6]
    ).info["warnings"]


def test_random_weights_are_probed_beside_the_models_own():
    vision, data = gf.load(tiny.dinov2(), prepare=pixels), painted()
    for parameter in vision.module.parameters():
        parameter.data *= 1.3  # as drawn, they would be the twin's
    run = gf.probe(vision, data, controls="random-weights", workers=0)
    plain = gf.probe(vision, data, workers=0)
    mine = run.layers[run.layers["control"] == ""]
    paired = mine["r2:random-weights"]
    mine = mine.drop(columns="r2:random-weights")
    pd.testing.assert_frame_equal(mine.reset_index(drop=True), plain.layers)
    twin = run.layers[run.layers["control"] == "random-weights"]
    assert list(twin["site"]) == list(mine["site"])
    assert set(twin["tower"]) == {"vision"}
    alone = gf.probe(random_twin(vision), data, workers=0).layers
    np.testing.assert_array_equal(twin["r2"], alone["r2"])
    np.testing.assert_array_equal(twin["r2"], paired)
    assert not np.allclose(twin["r2"], mine["r2"])
    assert run.best.site == plain.best.site
    assert {p.site for p in run.probes.values()} == set(mine["site"])
    by_gram = gf.probe(vision, data, controls="random-weights", storage="gram", workers=0).layers
    rows = gf.probe(vision, data, controls="random-weights", select="gcv", workers=0).layers
    order = ["control", "site"]
    np.testing.assert_allclose(
        by_gram.sort_values(order)["r2"], rows.sort_values(order)["r2"], atol=1e-6
    )
    with pytest.raises(ValueError, match="unknown control 'noise'; there is random-weights, pix"):
        gf.probe(vision, data, controls=["noise"])
