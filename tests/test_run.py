from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal

import geofast.run
from geofast import _folder, report
from geofast.geo import great_circle_km
from geofast.gram import Gram
from geofast.run import Probe, Run, key

TARGETS = ("latitude", "longitude")


def example_run(
    n: int = 300,
    *,
    pools: Sequence[str] = ("cls", "mean:patch"),
    prompts: Sequence[str] = ("",),
    splits: Sequence[str] = ("kfold", "blocks15"),
    tower: str = "vision",
    blocks: int = 12,
    shift: float = 0.0,
    d: int = 8,
) -> Run:
    """A run as a probe makes it: R2 rises and falls with depth, the second split is harder."""
    rng = np.random.default_rng(0)
    sites = [f"{tower}.embed", *(f"{tower}.layers.{i}" for i in range(blocks))]
    table: list[dict[str, Any]] = []
    probes = {}
    for s, split in enumerate(splits):
        for depth, site in enumerate(sites):
            for p, pool in enumerate(pools):
                for q, prompt in enumerate(prompts):
                    bump = 4 * depth / blocks * (1.15 - depth / blocks)
                    lat = 0.35 + 0.43 * bump - 0.05 * p - 0.03 * q - 0.08 * s + shift
                    lon = 0.05 + 0.42 * bump - 0.06 * p - 0.04 * q - 0.40 * s * bump + shift
                    where = {
                        "site": site,
                        "tower": tower,
                        "layer": depth - 1 if depth else None,
                        "pool": pool,
                        "prompt": prompt,
                        "group": "",
                        "split": split,
                        "control": "",
                    }
                    table.append({**where, "n": n, "d": d, "alpha": 151.9911, **scores(lat, lon)})
                    coef = torch.from_numpy(rng.normal(size=(d, 2)))
                    intercept = torch.from_numpy(rng.normal(size=2))
                    probe = Probe(site, pool, prompt, TARGETS, 151.9911, coef, intercept)
                    probes[probe.name] = probe
        baseline = {"site": "pixels", "tower": "", "split": split, "control": "raw pixels"}
        baseline |= {"pool": "", "n": n, "d": 768, "alpha": 10.0}
        table.append({**baseline, **scores(0.37 - 0.1 * s, 0.03 - 0.1 * s)})
    layers = pd.DataFrame(table)
    samples = example_samples(n, splits, rng)
    honest = {}
    for split in splits:
        rows = layers[(layers["split"] == split) & (layers["control"] == "")]
        row = rows.sort_values("r2").iloc[-2]
        honest[split] = {c: row[c] for c in ("site", "pool", "prompt")}
        honest[split] |= {"r2": row["r2"] - 0.01, "r2_se": 0.024}
    info = {
        "model": "hf:facebook/dinov2-small",
        "data": "satellite",
        "arguments": {"pool": list(pools), "select": "loo"},
        "device": "cpu",
        "dtype": "float32",
        "backend": "cpu",
        "counts": {"read": n, "skipped": 3, "why": ["a.csv row 1: no latitude"] * 3},
        "seconds": {"pass": 100.25},
        "warnings": [],
        "honest": honest,
    }
    rows = {name: torch.from_numpy(rng.normal(size=(n, d)).astype(np.float32)) for name in probes}
    return Run(info, layers, samples, probes, example_predictions(samples, splits, rng), rows)


def scores(lat: float, lon: float) -> dict[str, float]:
    r2 = (lat + lon) / 2
    columns = {"r2": r2, "r2_se": 0.021, "r2_latitude": lat, "r2_longitude": lon}
    return columns | {"mean_km": 9000 * (1 - r2), "median_km": 7000 * (1 - r2)}


def example_samples(n: int, splits: Sequence[str], rng: np.random.Generator) -> pd.DataFrame:
    # Names that a careless reader of CSV would change.
    ids = [f"{i:05d}" for i in range(n)]
    ids[:5] = ["", "NA", 'a "b", c', "two\nlines", "carriage\rreturn"]
    samples = pd.DataFrame({"id": ids})
    samples["latitude"] = np.degrees(np.arcsin(rng.uniform(-0.85, 0.95, n)))
    samples["longitude"] = rng.uniform(-180, 180, n)
    samples["country"] = rng.choice(["NA", "FR", ""], n)
    samples["height"] = np.where(np.arange(n) % 7 == 0, np.nan, rng.normal(size=n))
    samples["indoors"] = np.arange(n) % 2 == 0
    for split in splits:
        samples[f"fold_{split}"] = rng.integers(0, 5, n)
    return samples


def example_predictions(
    samples: pd.DataFrame, splits: Sequence[str], rng: np.random.Generator
) -> pd.DataFrame:
    parts = []
    for s, split in enumerate(splits):
        part = samples[["id", *TARGETS]].copy()
        part.insert(0, "split", split)
        part.insert(2, "fold", samples[f"fold_{split}"])
        lat, lon = part["latitude"].to_numpy(), part["longitude"].to_numpy()
        guess_lat = lat + rng.normal(0, 8 + 5 * s, len(part))
        guess_lon = 0.7 * lon + rng.normal(0, 30 + 20 * s, len(part))
        part["latitude_predicted"], part["longitude_predicted"] = guess_lat, guess_lon
        part["error_km"] = great_circle_km(lat, lon, np.clip(guess_lat, -90, 90), guess_lon)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def folders(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


write_report = report.write_report


@pytest.fixture(autouse=True)
def plain_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes half a second, and most tests here are about other files."""

    def write(run: Run, folder: Path, told: str | Path) -> None:
        (folder / "README.md").write_text(run.summary())

    monkeypatch.setattr(report, "write_report", write)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved run; read only."""
    return example_run().save(tmp_path_factory.mktemp("runs") / "dino")


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A saved run to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def fast_run() -> Run:
    """A run that saves quickly: little to draw."""
    run = example_run(40, blocks=2, splits=("kfold",))
    run.predictions = pd.DataFrame()
    return run


# ---------------------------------------------------------------- Probe


def make_probe(d: int = 5, k: int = 2) -> Probe:
    generator = torch.Generator().manual_seed(1)
    coef = torch.randn(d, k, generator=generator, dtype=torch.float64)
    intercept = torch.randn(k, generator=generator, dtype=torch.float64)
    return Probe("vision.layers.3", "cls", "", tuple("abcdefghij"[:k]), 0.5, coef, intercept)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_probe_takes_numpy_and_torch_and_computes_in_float64(dtype: str) -> None:
    probe = make_probe()
    x = (np.random.default_rng(0).normal(size=(7, 5)) * 100).astype(dtype)
    expected = [
        [
            sum(float(row[i]) * float(probe.coef[i, j]) for i in range(5))
            + float(probe.intercept[j])
            for j in range(2)
        ]
        for row in x
    ]
    out = probe(x)
    assert isinstance(out, np.ndarray)
    assert out.dtype == np.float64
    np.testing.assert_allclose(out, expected, rtol=1e-13)
    out_torch = probe(torch.from_numpy(x))
    assert isinstance(out_torch, torch.Tensor)
    assert out_torch.dtype == torch.float64
    np.testing.assert_allclose(out_torch.numpy(), expected, rtol=1e-13)


def test_probe_takes_bfloat16_and_no_rows() -> None:
    probe = make_probe()
    x = torch.randn(3, 5).bfloat16()
    assert torch.equal(probe(x), probe(x.double()))
    assert probe(x[:0]).shape == (0, 2)
    assert probe(np.zeros((0, 5))).shape == (0, 2)


def test_probe_names_and_moves() -> None:
    probe = make_probe()
    assert probe.name == "vision.layers.3/cls"
    assert key("lm.layers.0", "last", "bare") == "lm.layers.0/last/bare"
    moved = probe.to("meta")
    assert moved.coef.device.type == moved.intercept.device.type == "meta"
    assert probe.coef.device.type == "cpu"


def test_what_is_printed_is_short(whole: Path) -> None:
    run = geofast.run.open(whole)
    said = "Probe(vision.layers.6/cls, d=8, alpha=152)"
    assert repr(run.best) == said
    counted = "dinov2-small on satellite: 300 samples (3 skipped), 13 sites, 2 pools"
    assert repr(run) == f"Run({counted}; best: {said})"
    names = "vision.embed/cls, ..., vision.layers.9/mean:patch"
    assert repr(run.rows) == f"<26 read from disk when asked for: {names}>"
    run.probes = {}
    assert repr(run) == f"Run({counted})"


def test_probe_refuses_what_does_not_fit() -> None:
    probe = make_probe()
    with pytest.raises(ValueError, match=r"takes rows \[n, 5\]; got \[2, 4\]"):
        probe(np.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"got \[5\]"):
        probe(torch.zeros(5))
    with pytest.raises(TypeError, match="got list"):
        probe([[0.0] * 5])  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="coef"):
        Probe("s", "cls", "", ("a",), 1.0, torch.zeros(3, 2).double(), torch.zeros(1).double())
    with pytest.raises(TypeError, match="float64"):
        Probe("s", "cls", "", ("a",), 1.0, torch.zeros(3, 1), torch.zeros(1))


# ---------------------------------------------------------------- what a run knows


def test_best_is_the_highest_of_the_first_split_without_controls_and_groups() -> None:
    run = example_run()
    extra = run.layers.iloc[[0, 0]].copy()
    extra["r2"] = [0.98, 0.99]
    extra["control"] = ["leaky", ""]
    extra["group"] = ["", "Streets"]
    run.layers = pd.concat([run.layers, extra], ignore_index=True)
    first = run.layers[run.layers["split"] == "kfold"].iloc[: 13 * 2]
    row = first.loc[first["r2"].idxmax()]
    assert (run.best.site, run.best.pool) == (row["site"], row["pool"])
    assert run.splits == ["kfold", "blocks15"]
    assert run.targets == TARGETS


def test_best_layer_tells_optimistic_and_honest() -> None:
    run = example_run()
    best = run.best_layer("blocks15")
    assert best.optimistic.r2 == run.rows_of("blocks15")["r2"].max()
    assert best.honest is not None
    assert best.honest.r2 == run.info["honest"]["blocks15"]["r2"]
    assert best.honest.r2 < best.optimistic.r2
    del run.info["honest"]
    assert run.best_layer("kfold").honest is None
    with pytest.raises(ValueError, match="no split 'blocks'; it has kfold, blocks15"):
        run.best_layer("blocks")


def test_layers_get_one_form() -> None:
    table = pd.DataFrame(
        {
            "site": ["projector", "lm.layers.0"],
            "pool": ["mean:image", "last"],
            "split": "kfold",
            "r2": [0.1, 0.2],
            "layer": ["", 0],
            "control": [np.nan, None],
        }
    )
    run = Run({}, table, pd.DataFrame(), {})
    assert run.layers["control"].tolist() == run.layers["prompt"].tolist() == ["", ""]
    assert run.layers["layer"].isna().tolist() == [True, False]
    assert str(run.layers["layer"].dtype) == "Int64"
    with pytest.raises(ValueError, match="no column 'r2'"):
        Run({}, table.drop(columns="r2"), pd.DataFrame(), {})


# ---------------------------------------------------------------- save and open


def test_save_and_open_are_exact(whole: Path) -> None:
    run, again = example_run(), geofast.run.open(whole)
    assert again.path == whole
    for name in ("layers", "samples", "predictions"):
        assert_frame_equal(getattr(again, name), getattr(run, name), check_exact=True)
    assert again.layers["control"].iloc[0] == again.layers["prompt"].iloc[0] == ""
    assert again.samples["id"].tolist()[:5] == run.samples["id"].tolist()[:5]
    assert again.info == run.info
    assert list(again.probes) == list(run.probes)
    for name, probe in run.probes.items():
        other = again.probes[name]
        assert other.name == name
        assert (other.targets, other.alpha) == (probe.targets, probe.alpha)
        assert torch.equal(other.coef, probe.coef)
        assert torch.equal(other.intercept, probe.intercept)
    assert again.rows is not None
    assert run.rows is not None
    assert sorted(again.rows) == sorted(run.rows)
    for name, rows in run.rows.items():
        assert torch.equal(again.rows[name], rows)
        assert again.rows[name].dtype == rows.dtype
    assert again.grams is None
    with pytest.raises(KeyError):
        again.rows["no such site"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_keep_their_dtype_and_prompts_their_names(tmp_path: Path, dtype: torch.dtype) -> None:
    run = example_run(30, blocks=1, pools=("last",), prompts=("bare", "city"), tower="lm")
    assert run.rows is not None
    run.rows = {name: rows.to(dtype) for name, rows in run.rows.items()}
    again = geofast.run.open(run.save(tmp_path / "r"))
    assert again.rows is not None
    assert set(again.rows) == set(again.probes) == {
        f"lm.{s}/last/{p}" for s in ("embed", "layers.0") for p in ("bare", "city")
    }  # fmt: skip
    for name, rows in run.rows.items():
        assert torch.equal(again.rows[name], rows)


def test_grams_come_back(tmp_path: Path) -> None:
    run = fast_run()
    run.rows = None
    gram = Gram(3, 2, 4)
    gram.shift = torch.arange(5, dtype=torch.float64)
    gram.matrix = torch.randn(4, 6, 6, dtype=torch.float64)
    run.grams = {"vision.layers.0/cls": gram}
    path = run.save(tmp_path / "r")
    again = geofast.run.open(path)
    assert again.rows is None
    assert again.grams is not None
    assert list(again.grams) == ["vision.layers.0/cls"]
    back = again.grams["vision.layers.0/cls"]
    assert torch.equal(back.matrix, gram.matrix)
    assert back.shift is not None
    assert torch.equal(back.shift, gram.shift)
    assert (back.dim, back.targets, back.cells) == (3, 2, 4)
    assert not (path / "rows.safetensors").exists()


def test_what_was_not_computed_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "write_report", write_report)
    run = fast_run()
    run.rows = None
    path = run.save(tmp_path / "r")
    expected = {"README.md", "layers.csv", "layers.png", "probe.safetensors", "report.html"}
    assert set(folders(path)) == expected | {"run.json", "samples.csv"}
    again = geofast.run.open(path)
    assert again.predictions.empty
    assert again.rows is None


def test_run_json_is_strict_and_lists_the_files(whole: Path) -> None:
    def refuse(token: str) -> None:
        raise AssertionError(token)

    about = json.loads((whole / "run.json").read_text(), parse_constant=refuse)
    assert about["geofast_run"] == 1
    names = set(folders(whole)) - {"run.json"}
    assert about["files"] == {name: (whole / name).stat().st_size for name in names}


def test_info_becomes_strict_json(tmp_path: Path) -> None:
    run = fast_run()
    run.info |= {
        "loss": float("nan"),
        "most": np.float32(0.5),
        "alphas": (0.1, np.inf),
        "dtype": torch.bfloat16,
        "folder": Path("a/b"),
        "seeds": {5: np.arange(2)},
    }
    info = geofast.run.open(run.save(tmp_path / "r")).info
    assert info["loss"] is None
    assert (info["most"], info["alphas"]) == (0.5, [0.1, None])
    assert (info["dtype"], info["folder"]) == ("torch.bfloat16", str(Path("a/b")))
    assert info["seeds"] == {"5": [0, 1]}
    run.info["arguments"]["model"] = torch.nn.Identity()
    with pytest.raises(TypeError, match=r"info\['arguments'\]\['model'\] is a Identity"):
        run.save(tmp_path / "other")
    assert folders(tmp_path) == ["r"]


def test_others_may_read_what_the_umask_allows(whole: Path) -> None:
    modes = {(whole / name).stat().st_mode & 0o777 for name in folders(whole)}
    assert modes == {whole.stat().st_mode & 0o666}


# ---------------------------------------------------------------- folders that are not whole


def test_open_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        geofast.run.open(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"has no run\.json"):
        geofast.run.open(tmp_path)
    (tmp_path / "run.json").write_text('{"name": "another tool"}')
    with pytest.raises(ValueError, match="is not a geofast run's"):
        geofast.run.open(tmp_path)


@pytest.mark.parametrize("entry", ["tables", "files", "geofast_run"])
def test_open_refuses_a_run_json_that_lacks_an_entry(copy: Path, entry: str) -> None:
    about = json.loads((copy / "run.json").read_text())
    del about[entry]
    (copy / "run.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"run\.json is not a geofast run's, or not all of it"):
        geofast.run.open(copy)


@pytest.mark.parametrize("name", ["run.json", "probe.safetensors", "rows.safetensors"])
def test_open_names_a_file_of_the_right_size_that_is_damaged(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[8:40] = bytes(32)
    (copy / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is damaged \(.*copy the folder again"):
        geofast.run.open(copy)


def test_open_names_a_table_that_is_damaged(copy: Path) -> None:
    text = (copy / "layers.csv").read_text()
    (copy / "layers.csv").write_text(text.replace(",300,", ",3x0,"))
    with pytest.raises(ValueError, match=r"layers\.csv is damaged"):
        geofast.run.open(copy)


def test_open_refuses_a_run_that_was_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(folder: Path, *_: object) -> None:
        shutil.copytree(folder, tmp_path / "left")  # what a killed process leaves
        raise KeyboardInterrupt

    monkeypatch.setattr(_folder, "seal", killed)
    with pytest.raises(KeyboardInterrupt):
        fast_run().save(tmp_path / "r")
    assert folders(tmp_path) == ["left"]
    assert (tmp_path / "left" / "rows.safetensors").exists()
    with pytest.raises(FileNotFoundError, match=r"cut off: it has no run\.json"):
        geofast.run.open(tmp_path / "left")


@pytest.mark.parametrize("name", ["rows.safetensors", "probe.safetensors", "layers.csv"])
def test_open_refuses_a_truncated_file(copy: Path, name: str) -> None:
    size = (copy / name).stat().st_size
    with (copy / name).open("r+b") as file:
        file.truncate(size - 1)
    with pytest.raises(
        ValueError, match=rf"{name} has {size - 1} bytes where .* says {size}; copy"
    ):
        geofast.run.open(copy)


def test_open_refuses_a_missing_file(copy: Path) -> None:
    (copy / "samples.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"samples\.csv is missing, though run\.json lists"):
        geofast.run.open(copy)


def test_pages_are_for_people_to_edit(copy: Path) -> None:
    (copy / "README.md").write_text("my notes")
    (copy / "report.html").unlink()
    assert geofast.run.open(copy).best.name


def test_open_refuses_a_newer_format(copy: Path) -> None:
    about = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(about | {"geofast_run": 2}))
    with pytest.raises(ValueError, match="format 2; this geofast reads 1: upgrade"):
        geofast.run.open(copy)


# ---------------------------------------------------------------- writing fails


@pytest.mark.parametrize(
    ("limit", "stops"), [(20_000, "pandas"), (60_000, "safetensors"), (150_000, "pictures")]
)
def test_a_real_write_error_leaves_nothing_behind(
    tmp_path: Path, limit: int, stops: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if stops == "pictures":
        monkeypatch.setattr(report, "write_report", write_report)
    run = example_run(
        200 if stops == "pandas" else 150, blocks=2, d=60 if stops != "pictures" else 8
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match="could not write the run to") as caught:
            run.save(tmp_path / "r")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    cause = type(caught.value.__cause__)
    assert (cause.__name__ == "SafetensorError") == (stops == "safetensors")
    message = str(caught.value)
    assert "File too large" in message
    assert str(tmp_path / "r") in message
    assert folders(tmp_path) == []
    run.save(tmp_path / "r")  # and with room it works


def test_a_full_disk_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    run = fast_run()
    run.rows = {"vision.layers.0/cls": torch.zeros(1000, 1000)}
    pattern = r"No space left on device\. It needs about 5\.5 MB and 0\.0 MB are free"
    with pytest.raises(OSError, match=pattern):
        run.save(tmp_path / "a" / "r")
    assert list((tmp_path / "a").iterdir()) == []


def test_a_failed_overwrite_keeps_the_old_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = fast_run()
    path = old.save(tmp_path / "r")
    run = fast_run()
    run.info["data"] = "newer"
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    # No word on room: there is enough.
    with pytest.raises(OSError, match=r"Permission denied\. Nothing was left behind; save elsewh"):
        run.save(path, overwrite=True)
    assert folders(tmp_path) == ["r"]
    assert geofast.run.open(path).info["data"] == "satellite"


# ---------------------------------------------------------------- overwriting


def test_overwriting_is_asked_for(tmp_path: Path) -> None:
    run = fast_run()
    path = run.save(tmp_path / "r")
    assert run.path == path
    with pytest.raises(FileExistsError, match="holds a run already; pass overwrite=True"):
        run.save(path)
    run.info["data"] = "newer"
    run.save(path, overwrite=True)
    assert geofast.run.open(path).info["data"] == "newer"
    assert folders(tmp_path) == ["r"]


def test_an_opened_run_can_replace_itself(copy: Path) -> None:
    run = geofast.run.open(copy)
    assert run.rows is not None
    name = next(iter(run.rows))
    before = run.rows[name].clone()
    run.save(copy, overwrite=True)
    assert torch.equal(run.rows[name], before)
    again = geofast.run.open(copy)
    assert again.rows is not None
    assert torch.equal(again.rows[name], before)


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_run_is_never_replaced(tmp_path: Path, overwrite: bool) -> None:
    run = fast_run()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years")
    (tmp_path / "file").write_text("text")
    for name in ("thesis", "file"):
        with pytest.raises(FileExistsError, match="is not a run's folder; choose another path"):
            run.save(tmp_path / name, overwrite=overwrite)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years"
    assert folders(tmp_path) == ["file", "thesis"]


def test_a_run_with_files_of_others_is_not_replaced(tmp_path: Path) -> None:
    run = fast_run()
    path = run.save(tmp_path / "r")
    (path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds 'notes\.txt', which its run did not write"):
        run.save(path, overwrite=True)
    assert (path / "notes.txt").read_text() == "mine"


def test_a_place_where_no_folder_can_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(NotADirectoryError, match=r"cannot be made: .*file is not a folder"):
        fast_run().save(tmp_path / "file" / "r")
    assert folders(tmp_path) == ["file"]
    # As root nothing is read-only but what the system makes up.
    with pytest.raises(OSError, match=r"/r cannot be made: /proc takes no folder \([A-Z].*choose"):
        fast_run().save("/proc/foo/r")


def test_an_empty_folder_is_free(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    assert geofast.run.open(fast_run().save(tmp_path / "r")).best.name
    assert folders(tmp_path) == ["r"]


def test_a_leftover_of_a_killed_process_does_not_stop_a_save(tmp_path: Path) -> None:
    left = tmp_path / f".r.partial-{os.getpid()}"
    left.mkdir()
    (left / "junk").write_text("junk")
    path = fast_run().save(tmp_path / "r")
    assert folders(tmp_path) == ["r"]
    assert "junk" not in folders(path)


def test_two_writers_do_not_replace_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal: Callable[..., None] = _folder.seal

    def slow(*arguments: Any) -> None:
        seal(*arguments)
        monkeypatch.setattr(_folder, "seal", seal)
        monkeypatch.setattr(os, "getpid", lambda: 1)
        other = fast_run()
        other.info["data"] = "the quicker one"
        other.save(tmp_path / "r")

    monkeypatch.setattr(_folder, "seal", slow)
    with pytest.raises(FileExistsError, match="holds a run already"):
        fast_run().save(tmp_path / "r")
    assert folders(tmp_path) == ["r"]
    assert geofast.run.open(tmp_path / "r").info["data"] == "the quicker one"
