from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_run import example_run

import geofast.run
from geofast.cli import main
from geofast.geo import great_circle_km
from geofast.report import canvas, figures, layer_curve, map_of_predictions, page, text, world
from geofast.report.text import Table, finding
from geofast.report.verdict import Score, reads
from geofast.run import Run, beside

PALETTE = {"vermillion": "#D55E00", "blue": "#0072B2", "grey": "#6e6e6e"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return example_run().save(tmp_path_factory.mktemp("runs") / "dino")


def share(path: Path, colour: str, tolerance: int = 8) -> float:
    """Share of a picture's pixels that are about of one colour."""
    rgb = np.asarray(Image.open(path).convert("RGB")).astype(int)
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return float((np.abs(rgb - wanted).max(axis=-1) <= tolerance).mean())


def lines_of(run: Run) -> str:
    return " ".join(finding(run))


# ---------------------------------------------------------------- the finding


def one_row(**columns: object) -> Run:
    """A run of one site; `columns` change its only row."""
    run = example_run(30, blocks=1, pools=("cls",), splits=("kfold",))
    run.layers = run.layers.iloc[[1]].reset_index(drop=True).assign(**columns)
    run.info["honest"] = {}
    return run


WHERE = "(vision.layers.0, cls; random folds)."


@pytest.mark.parametrize(
    ("latitude", "longitude", "said"),
    [
        (0.9, 0.57, "reads latitude better than longitude: R² 0.900 against 0.570"),
        (0.31, 0.52, "reads longitude better than latitude: R² 0.520 against 0.310"),
        (0.502, 0.498, "reads latitude and longitude, neither clearly better: R² 0.502 and 0.498"),
        (0.5, -0.2, "reads latitude but not longitude: R² 0.500 against -0.200"),
        (-3.0, 0.5, "reads longitude but not latitude: R² 0.500 against -3.000"),
        (
            -0.4,
            -0.05,
            "reads neither longitude nor latitude "
            "(R²: longitude -0.050 ± 0.021, latitude -0.400 ± 0.021; ",
        ),
        # 0.04 is within 1.96 standard errors of 0.021 of nothing, 0.05 is not.
        (0.5, 0.04, "reads latitude but not longitude: R² 0.500 against 0.040"),
        (0.5, 0.05, "reads latitude better than longitude: R² 0.500 against 0.050"),
    ],
)
def test_finding_is_true_of_the_numbers(latitude: float, longitude: float, said: str) -> None:
    mean = (latitude + longitude) / 2
    run = one_row(r2=mean, r2_latitude=latitude, r2_longitude=longitude)
    where = WHERE.removeprefix("(") if said.endswith("; ") else f" {WHERE}"
    assert finding(run)[0] == f"dinov2-small {said}{where}"


def test_a_target_is_judged_by_its_own_standard_error() -> None:
    run = one_row(r2=0.3, r2_latitude=0.5, r2_longitude=0.1)
    assert "reads latitude better than longitude" in finding(run)[0]
    run.layers = run.layers.assign(r2_se_latitude=0.01, r2_se_longitude=0.06)
    assert finding(run)[0].startswith("dinov2-small reads latitude but not longitude: R² 0.500 ag")


@pytest.mark.parametrize(
    ("twin", "said"),
    [
        # 1.96 standard errors of a difference of two scores that have 0.021 each are 0.058.
        ((0.3, 0.1), "reads latitude better than longitude: R² 0.500 against 0.300"),
        ((0.3, 0.25), "reads latitude more than its random twin, longitude not clearly more: "
         "R² 0.500 against 0.300, 0.300 against 0.250"),
        ((0.51, 0.1), "reads longitude more than its random twin, latitude no more: "
         "R² 0.300 against 0.100, 0.500 against 0.510"),
        ((0.5, 0.31), "reads latitude and longitude no more than its random twin: "
         "R² 0.500 against 0.500, 0.300 against 0.310"),
        ((0.45, 0.31), "reads latitude and longitude not clearly more than its random twin: "
         "R² 0.500 against 0.450, 0.300 against 0.310"),
    ],
)  # fmt: skip
def test_nothing_is_read_that_a_random_twin_reads_too(twin: tuple[float, float], said: str) -> None:
    run = one_row(r2=0.4, r2_latitude=0.5, r2_longitude=0.3)
    r2 = {"r2": sum(twin) / 2, "r2_latitude": twin[0], "r2_longitude": twin[1]}
    random = run.layers.assign(control="random-weights", **r2)
    run.layers = pd.concat([run.layers, random], ignore_index=True)
    assert finding(run)[0] == f"dinov2-small {said} {WHERE}"


def test_what_is_not_read_at_all_is_not_held_against_the_twin() -> None:
    run = one_row(r2=0.12, r2_latitude=0.2, r2_longitude=0.04)
    random = run.layers.assign(control="random-weights")
    run.layers = pd.concat([run.layers, random], ignore_index=True)
    said = "reads latitude no more than its random twin, and not longitude: R² 0.200 against 0.200"
    assert finding(run)[0] == f"dinov2-small {said} {WHERE}"
    run.layers["r2_latitude"] = run.layers["r2_longitude"]
    assert finding(run)[0].startswith("dinov2-small reads neither latitude nor longitude (R²: ")


def test_the_layer_chosen_on_inner_folds_has_the_last_word() -> None:
    run = one_row(r2=0.2, r2_latitude=0.5, r2_longitude=0.3)
    place = {"site": "vision.embed", "pool": "cls", "prompt": ""}
    good = {"r2": 0.2, "r2_se": 0.05, "r2_latitude": 0.4, "r2_longitude": 0.2}
    run.info["honest"] = {"kfold": place | good}
    claim = f"dinov2-small reads latitude better than longitude: R² 0.500 against 0.300 {WHERE}"
    assert finding(run)[0] == claim
    errors = {"r2_longitude": -30.0, "r2_se_latitude": 0.05, "r2_se_longitude": 29.0}
    run.info["honest"] = {"kfold": place | good | errors}
    chosen = "(the layer chosen on inner folds; random folds)."
    said = "reads latitude but not longitude: R² 0.400 against -30.000"
    assert finding(run)[0] == f"dinov2-small {said} {chosen}"
    run.info["honest"] = {"kfold": place | {"r2": -736.4, "r2_se": 736.5}}  # an older run's
    said = "does not read latitude and longitude: R² -736.400 ± 736.500"
    assert finding(run)[0] == f"dinov2-small {said} {chosen}"
    run.info["honest"] = {"kfold": place | {"r2": 0.2, "r2_se": 0.05}}
    assert finding(run)[0] == claim


def test_many_targets_are_told_by_the_best_and_the_worst() -> None:
    def said(*twin: float) -> str:
        known = {"a": Score(0.5, 0.02), "b": Score(0.3, 0.02), "c": Score(-0.2, 0.02)}
        return reads(known, dict(zip("abc", map(Score, twin), strict=bool(twin))), "here")

    more = "clearly more than its random twin: R² of a 0.500 against"
    assert said() == (
        "reads 2 of 3 targets, a best and c worst: R² 0.500 against -0.200, 0.200 on average (here)"
    )
    assert said(0.1, 0.1, 0.1) == said()
    assert said(0.4, 0.3, 0.2) == (
        f"reads 1 of 3 targets {more} 0.400, 0.200 against 0.300 on average (here)"
    )
    assert said(0.6, 0.3, 0.0) == (
        f"reads none of 3 targets {more} 0.600, 0.200 against 0.300 on average (here)"
    )
    nothing = {t: Score(-0.1) for t in "abc"}
    assert reads(nothing, {}, "here") == (
        "reads none of 3 targets (R²: a -0.100, c -0.100, -0.100 on average; here)"
    )


def test_finding_of_other_targets_and_missing_numbers() -> None:
    run = one_row(r2=0.4)
    run.layers = run.layers.drop(columns=["r2_latitude", "r2_longitude", "median_km", "r2_se"])
    said = f"dinov2-small reads latitude and longitude: R² 0.400 {WHERE}"
    assert finding(run) == [said]
    run = one_row(r2=0.2, r2_latitude=np.nan, r2_longitude=0.2, median_km=np.nan)
    assert finding(run) == [f"dinov2-small reads longitude: R² 0.200 {WHERE}"]
    run = one_row(r2=0.01, r2_latitude=np.nan, r2_longitude=0.01, median_km=np.nan)
    assert finding(run) == [f"dinov2-small does not read longitude: R² 0.010 ± 0.021 {WHERE}"]


def test_finding_tells_the_other_split_the_controls_and_the_honest_best() -> None:
    run = example_run()
    honest = run.info["honest"]["kfold"]["r2"]
    best = run.rows_of("kfold")["r2"].max()
    blocks = run.rows_of("blocks15")["r2"].max()
    said = lines_of(run)
    assert f"Chosen on inner folds, the best layer scores R² {honest:.3f} ± 0.024" in said
    assert f"the highest of the table is {best:.3f}." in said
    assert f"With 15-degree blocks the highest R² falls to {blocks:.3f}" in said
    assert "R² of controls: raw pixels 0.200." in said
    run.layers.loc[run.layers["split"] == "blocks15", "r2"] += 0.5
    assert "With 15-degree blocks the highest R² rises to" in lines_of(run)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("hf:facebook/dinov2-small", "dinov2-small"),
        ("open_clip:ViT-B-32/laion2b_s34b_b79k", "ViT-B-32/laion2b_s34b_b79k"),
        ("/models/my-vit/", "my-vit"),
        ({"name": "hf:gpt2"}, "gpt2"),
        (None, "the model"),
    ],
)
def test_models_have_short_names(name: object, short: str) -> None:
    run = example_run(30, blocks=1)
    run.info["model"] = name
    assert text.model_name(run) == short


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize("shift", [0.0, -1.5])
def test_summary_fits_a_terminal(shift: float) -> None:
    run = example_run(
        60,
        blocks=30,
        tower="lm",
        pools=("last", "mean:text"),
        prompts=("bare", "city", "a question about its coordinates, at some length"),
        splits=("kfold", "group:country"),
        shift=shift,
    )
    summary = run.summary()
    assert max(map(len, summary.splitlines())) <= 100
    last = summary.rpartition("\n\n")[2]
    assert last.replace("\n", " ") == finding(run)[0]
    assert "falls to" in " ".join(summary.split())
    assert "Folds by country" in summary
    best = run.rows_of("group:country")["r2"].max()
    assert f"{best:.3f} ± 0.021" in summary
    assert "nan" not in summary
    assert "honest best" in summary.lower()


def test_every_group_has_a_row_per_split(tmp_path: Path) -> None:
    run = example_run(60, blocks=2, prompts=("bare", "city"))
    assert text.groups_table(run, "kfold") is None
    assert "Groups" not in run.summary()
    parts = [run.layers]
    for group, n, lift in (("Asia", 1234, 0.1), ("Europe", 40, -0.2)):
        part = run.layers[run.layers["split"] == "kfold"].assign(group=group, n=n)
        parts.append(part.assign(r2=part["r2"] + lift))
    control = parts[1]["control"] != ""
    parts[1].loc[control, "r2"] = 1.0  # a control is no best site
    run.layers = pd.concat(parts, ignore_index=True)
    best = run.rows_of("kfold").sort_values("r2").iloc[-1]
    table = text.groups_table(run, "kfold")
    assert table is not None
    where = [best["site"], best["pool"], best["prompt"]]
    assert table.cells == [
        ["Asia", *where, "1,234", f"{best['r2'] + 0.1:.3f} ± 0.021", "1.000"],
        ["Europe", *where, "40", f"{best['r2'] - 0.2:.3f} ± 0.021", "0.000"],
    ]
    assert text.groups_table(run, "blocks15") is None
    assert f"Groups, random folds\n{table.text()}" in run.summary()
    run.predictions = pd.DataFrame()
    page.write_report(run, tmp_path)
    assert table.markdown() in (tmp_path / "README.md").read_text()
    assert '<td class="word">Europe</td>' in (tmp_path / "report.html").read_text()


def test_summary_tells_warnings() -> None:
    run = example_run(60, splits=("kfold",))
    assert "Warning" not in run.summary()
    run.info["warnings"] = ["one " * 40 + "end", "another"]
    assert max(map(len, run.summary().splitlines())) <= 100
    said = " ".join(run.summary().split())
    assert f"Warning: {'one ' * 40}end Warning: another" in said


def test_summary_rows_are_the_best_of_each_pool_with_the_control_beside() -> None:
    run = example_run()
    table = text.summary_table(run, "kfold")
    assert table.headers == [
        "pool",
        "best site",
        "R² ± se",
        "lat",
        "lon",
        "median km",
        "raw pixels",
    ]
    for pool, cells in zip(("cls", "mean:patch"), table.cells, strict=True):
        rows = run.rows_of("kfold")
        top = rows[rows["pool"] == pool].sort_values("r2").iloc[-1]
        r2 = f"{top['r2']:.3f} ± {top['r2_se']:.3f}"
        parts = [f"{top['r2_latitude']:.3f}", f"{top['r2_longitude']:.3f}"]
        assert cells == [pool, top["site"], r2, *parts, f"{top['median_km']:,.0f}", "0.200"]


def test_summary_without_kilometres_controls_or_errors() -> None:
    run = example_run(60)
    run.layers = run.layers[run.layers["control"] == ""].drop(columns=["median_km", "r2_se"])
    run.info["honest"] = {}
    assert text.summary_table(run, "kfold").headers == [
        "pool",
        "best site",
        "R² ± se",
        "lat",
        "lon",
    ]
    summary = run.summary()
    assert " km" not in summary
    assert "optimistic" in summary


def with_random_weights(run: Run) -> Run:
    """Add a control that has the run's own sites: 0.3 below, or 0.5 after the first pool."""
    random = run.layers[run.layers["control"] == ""].copy()
    random["control"] = "random-weights"
    less = np.where(random["pool"] == random["pool"].iloc[0], 0.3, 0.5)
    for column in ("r2", "r2_latitude", "r2_longitude"):
        random[column] -= less
    run.layers = pd.concat([run.layers, random], ignore_index=True)
    return run


def test_controls_stand_beside_every_r2(tmp_path: Path) -> None:
    run = with_random_weights(example_run(60, splits=("kfold",)))
    table = text.summary_table(run, "kfold")
    assert table.headers[-2:] == ["raw pixels", "random"]
    best = [run.rows_of("kfold").query(f"pool == '{p}'")["r2"].max() for p in ("cls", "mean:patch")]
    assert [row[-1] for row in table.cells] == [f"{best[0] - 0.3:.3f}", f"{best[1] - 0.5:.3f}"]
    assert [row[-2] for row in table.cells] == ["0.200", "0.200"]
    by_site = text.layers_by_site(run, "kfold")
    beside = ["cls", "random: cls", "mean:patch", "random: mean:patch"]
    assert by_site.headers == ["site", *beside, "raw pixels"]
    for cells in by_site.cells:
        r2 = run.rows_of("kfold").query(f"site == '{cells[0]}'").set_index("pool")["r2"]
        cls, patch = r2["cls"], r2["mean:patch"]
        expected = [cls, cls - 0.3, patch, patch - 0.5, 0.2]
        assert cells[1:] == [text.number(v) for v in expected]
    run.predictions = pd.DataFrame()
    page.write_report(run, tmp_path)
    pages = [(tmp_path / name).read_text() for name in ("README.md", "report.html")]
    assert table.markdown() in pages[0]
    assert "<th>mean:patch</th><th>random: mean:patch</th><th>raw pixels</th>" in pages[1]
    for words in pages:
        assert (
            "Thin lines are controls: raw pixels with grey squares, random-weights with crosses "
            "in the colour of the same pool."
        ) in words
    lines = [line for line in layer_curve(run).axes[0].lines if line.get_marker() == "x"]
    drawn = [[float(v) for v in line.get_ydata()] for line in lines[:2]]
    for pool, offset, values, line in zip(
        ("cls", "mean:patch"), (0.3, 0.5), drawn, lines, strict=False
    ):
        own = run.rows_of("kfold").query(f"pool == '{pool}'")["r2"].to_numpy()
        np.testing.assert_allclose(values, own - offset)
        of_model = next(
            x for x in layer_curve(run).axes[0].lines if str(x.get_label()).startswith(pool)
        )
        assert line.get_color() == of_model.get_color()


def test_a_group_stands_beside_its_own_controls() -> None:
    run = with_random_weights(example_run(60, blocks=2, splits=("kfold",), pools=("cls",)))
    asia = run.layers.assign(group="Asia", n=9, r2=run.layers["r2"] + 0.1)
    run.layers = pd.concat([run.layers, asia], ignore_index=True)
    table = text.groups_table(run, "kfold")
    assert table is not None
    best = run.rows_of("kfold")["r2"].max() + 0.1
    assert table.headers[-2:] == ["raw pixels", "random"]
    assert table.cells[0][-3:] == [f"{best:.3f} ± 0.021", "0.300", f"{best - 0.3:.3f}"]


def test_raw_inputs_with_prompts_stand_beside_their_prompt() -> None:
    run = example_run(60, blocks=1, prompts=("bare", "city"), pools=("last",), splits=("kfold",))
    raw = run.layers[run.layers["control"] != ""].assign(control="tokens", site="input")
    both = [raw.assign(prompt="bare", r2=0.11), raw.assign(prompt="city", r2=0.22)]
    run.layers = pd.concat([run.layers, *both], ignore_index=True)
    assert text.summary_table(run, "kfold").headers[-2:] == ["raw pixels", "tokens"]
    assert [row[-2:] for row in text.summary_table(run, "kfold").cells] == [
        ["0.200", "0.110"],
        ["0.200", "0.220"],
    ]
    found = beside(run.layers)
    assert list(found.columns) == ["raw pixels", "tokens"]
    assert found[run.layers["control"] != ""].isna().all(axis=None)


def test_a_control_that_scores_as_high_is_said() -> None:
    run = with_random_weights(example_run(60, splits=("kfold",)))
    assert "no sign of learning" not in lines_of(run)
    twin = run.layers["control"] == "random-weights"
    run.layers.loc[twin, ["r2", "r2_latitude", "r2_longitude"]] += 0.4
    assert "no more than its random twin" in finding(run)[0]
    said = "random-weights scores no lower than dinov2-small, whose R² is then no sign of learning."
    assert said in lines_of(run)
    assert said in " ".join(run.summary().split())


@pytest.mark.parametrize("tower", ["vision", "lm"])
def test_a_summary_with_prompts_and_controls_fits_a_terminal(tower: str) -> None:
    asked = ("{name}", "The city of {name}", "What are the coordinates of {name}?")
    run = example_run(60, blocks=30, tower=tower, pools=("last", "mean:patch"), prompts=asked)
    run = with_random_weights(run)
    run.layers["control"] = run.layers["control"].replace({"raw pixels": "pixels"})
    assert max(map(len, run.summary().splitlines())) <= 100
    assert "\n2: The city of {name}\n" in run.summary()


def test_columns_that_do_not_fit_a_terminal_are_named() -> None:
    run = example_run(60, pools=("cls", "mean:patch", "max:patch"))
    raw = run.layers[run.layers["control"] != ""]
    more = [raw.assign(control=f"features-{i}") for i in range(9)]
    group = run.layers[run.layers["control"] == ""].assign(group="Asia")
    run.layers = pd.concat([run.layers, group, *more], ignore_index=True)
    said = run.summary()
    assert max(map(len, said.splitlines())) <= 100
    table = text.summary_table(run, "kfold")
    assert len(table.headers) == 6 + 10
    shown = [name for name in table.headers if name in said.splitlines()[3]]
    assert shown[:7] == ["pool", "best site", "R² ± se", "lat", "lon", "median km", "raw pixels"]
    hidden = len(table.headers) - len(shown)
    named = f" {hidden} more columns in layers.csv: {', '.join(table.headers[-hidden:])} "
    assert named in " ".join(said.split())
    assert len(said.split("more columns in layers.csv: ")) == 1 + 2 + 2  # splits, and their groups
    assert "layers.csv" not in example_run(60).summary()


def test_one_column_that_does_not_fit() -> None:
    words = ["a" * 40, "b" * 40]
    table = Table([*words, "R²", "twelve chars"], [["x", "y", "0.5", "0.6"]], 2)
    assert table.text().splitlines()[-1] == "One more column in layers.csv: twelve chars"
    assert table.text().splitlines()[0].split() == [*words, "R²"]
    assert "twelve chars" in table.markdown()


def test_layer_table_has_a_row_per_site_and_a_column_per_pool() -> None:
    run = example_run(30, blocks=3, prompts=("bare", "city"))
    lines = run.layer_table("kfold").splitlines()
    assert lines[2].split("  ")[0] == "site"
    assert [line.split()[0] for line in lines[4:]] == list(run.rows_of("kfold")["site"].unique())
    rows = run.rows_of("kfold")
    first = rows[rows["site"] == "vision.embed"]["r2"]
    assert lines[4].split()[1:-1] == [f"{v:.3f}" for v in first]


def test_tables_as_text_and_markdown() -> None:
    table = Table(["pool", "R²"], [["a|b", "0.5"], ["c", "-0.25"]], 1)
    assert table.text() == "pool     R²\n----  -----\na|b     0.5\nc     -0.25"
    assert table.markdown() == "| pool | R² |\n| --- | ---: |\n| a\\|b | 0.5 |\n| c | -0.25 |"


def test_numbers_have_no_negative_zero() -> None:
    assert text.number(-0.0001) == "0.000"
    assert text.number(-0.0006) == "-0.001"
    assert text.number(float("nan")) == text.number(None) == ""


# ---------------------------------------------------------------- pictures


def test_pictures_show_what_they_should(saved: Path) -> None:
    layers, world = saved / "layers.png", saved / "map.png"
    for picture in (layers, world):
        image = Image.open(picture)
        assert image.width == 1600
        assert np.asarray(image.convert("L")).std() > 20
    for name, colour in PALETTE.items():
        assert share(layers, colour) > 2e-4, name
    assert share(layers, "#FFFFFF") > 0.6
    assert 0.15 < share(world, "#DBDBDB") < 0.35  # land
    assert share(world, "#440154") > 1e-3  # errors of more than 5,000 km


def test_a_small_error_looks_unlike_a_large_one(tmp_path: Path) -> None:
    run = example_run(splits=("kfold",))
    predictions = run.predictions
    for column in ("latitude", "longitude"):
        predictions[f"{column}_predicted"] = predictions[column] + 0.1
    predictions["error_km"] = 15.0
    canvas.save(map_of_predictions(run), tmp_path / "map.png")
    # The legend has every colour; the dots have only one.
    assert share(tmp_path / "map.png", "#440154") < 6e-3
    assert share(tmp_path / "map.png", "#addc30", 12) > 8e-3


def test_layer_curve_says_the_finding_and_marks_the_honest_best() -> None:
    run = example_run()
    figure = layer_curve(run)
    assert finding(run)[0].rstrip(".") == figure.get_suptitle().replace("\n", " ")
    first, second = figure.axes
    assert "mean of latitude and longitude" in first.get_ylabel()
    assert first.get_xlabel() == "layer (vision)"
    assert re.fullmatch(
        r"Random folds: honest best R² 0\.\d{3} ± 0\.024\nvision\.layers\.5, cls",
        first.get_title(loc="left"),
    )
    assert second.get_title(loc="left").startswith("15-degree blocks")
    stars = [line for line in first.lines if line.get_marker() == "*"]
    honest = run.info["honest"]["kfold"]
    assert [float(v) for v in stars[0].get_ydata()] == [honest["r2"]]
    sites = list(run.rows_of("kfold")["site"].unique())
    assert [int(v) for v in stars[0].get_xdata()] == [sites.index(honest["site"])]
    curve = next(line for line in first.lines if line.get_label() == "cls, mean")
    rows = run.rows_of("kfold")
    np.testing.assert_array_equal(curve.get_ydata(), rows[rows["pool"] == "cls"]["r2"])


def test_a_split_far_below_zero_leaves_the_other_its_room() -> None:
    run = example_run()
    table = run.layers
    table.loc[(table["split"] == "blocks15") & (table["control"] == ""), "r2"] -= 5.5
    run.info["honest"]["blocks15"]["r2"] = -5.21
    first, second = layer_curve(run).axes
    low, high = first.get_ylim()
    assert (low, second.get_ylim()) == (-0.5, (low, high))
    assert high < 1.05
    assert [t.get_text() for t in first.texts] == []
    best = run.rows_of("blocks15")["r2"].max()
    said = f"cut at -0.5; all sites are below, the highest R² is {best:.3f}"
    assert [t.get_text() for t in second.texts] == ["R² -5.210", said]
    (star,) = (line for line in second.lines if line.get_marker() == "*")
    assert [float(v) for v in star.get_ydata()] == [-0.5]
    run.layers.loc[0, "r2"] = -1e6  # one site of the first split
    assert [t.get_text() for t in layer_curve(run).axes[0].texts] == ["cut at -0.5"]


def test_layer_curve_of_many_towers_branches_splits_and_controls() -> None:
    run = example_run(60, splits=("kfold", "blocks15", "group:country"), blocks=4)
    lm = example_run(60, splits=("kfold", "blocks15", "group:country"), blocks=4, tower="lm")
    branch = run.layers[run.layers["layer"].notna()].copy()
    branch["site"] += ".attn"
    random = run.layers[run.layers["control"] == ""].assign(control="random weights", r2=0.1)
    run.layers = pd.concat([run.layers, branch, lm.layers, random], ignore_index=True)
    figure = layer_curve(run)
    assert [axes.get_visible() for axes in figure.axes] == [True, True, True, False]
    ticks = [label.get_text() for label in figure.axes[2].get_xticklabels()]
    assert ticks == ["\nembed", *"0123"] * 2
    assert figure.axes[2].get_xlabel() == "layer (vision, then lm)"
    (legend,) = figure.legends
    labels = [t.get_text() for t in legend.get_texts()]
    assert {"cls", "cls attn", "control: random weights"} <= set(labels)


def test_the_map_has_the_tables_figures() -> None:
    run = example_run()
    for axes, split in zip(map_of_predictions(run).axes, run.splits, strict=False):
        rows = run.rows_of(split)
        best = rows.loc[rows["r2"].idxmax()]
        said = f"300 samples, median error {best['median_km']:,.0f} km"
        title = axes.get_title(loc="left")
        assert title == (
            f"{text.split_words(split).capitalize()}: {said} ({best['site']}, {best['pool']})"
        )
        assert f"{best['median_km']:,.0f}" in run.summary()
    run.layers = run.layers.drop(columns="median_km")
    assert "median" not in map_of_predictions(run).axes[0].get_title(loc="left")


def test_the_map_says_how_many_are_drawn() -> None:
    run = example_run(1000, blocks=1, splits=("kfold",))
    figure = map_of_predictions(run)
    title = figure.axes[0].get_title(loc="left")
    assert title.startswith("Random folds: 400 of 1,000 samples drawn, median error of all ")
    assert [t.get_text() for t in figure.axes[1].get_xticklabels()][-2:] == ["5,000", "over 5,000"]


def test_folds_that_chose_the_honest_best_are_counted() -> None:
    run = example_run()
    honest = run.info["honest"]
    assert text.honest_place(run, "kfold") == "vision.layers.5, cls"
    honest["kfold"]["chosen"] = ["vision.layers.5/cls"] * 3 + ["vision.layers.6/cls"] * 2
    honest["blocks15"]["chosen"] = [f"{honest['blocks15']['site']}/cls"] * 5
    assert text.honest_place(run, "kfold") == "3 of 5 folds chose vision.layers.5, cls"
    assert text.honest_place(run, "blocks15").startswith("all 5 folds chose vision.layers.")
    assert text.majority(run, "kfold")
    assert "3 of 5 folds chose vision.layers.5, cls" in " ".join(run.summary().split())
    assert "\n3 of 5 folds chose" in layer_curve(run).axes[0].get_title(loc="left")


def test_folds_that_do_not_agree_have_no_star(tmp_path: Path) -> None:
    run = example_run(40, blocks=8, prompts=("a/b", "city"), splits=("kfold",))
    run.predictions = pd.DataFrame()
    honest = run.info["honest"]["kfold"]
    honest["chosen"] = [f"vision.layers.{i}/cls/city" for i in range(3)]
    assert text.honest_place(run, "kfold") == "each of 3 folds chose another layer"
    honest["chosen"] = ["vision.layers.5/cls/a/b", "vision.layers.5/cls/city"]
    said = "each of 2 folds chose another layer, pool or prompt"
    assert text.honest_place(run, "kfold") == said
    assert said in " ".join(run.summary().split())
    two = ["vision.layers.5/cls/a/b"] * 2
    honest["chosen"] = [*two, "vision.layers.4/cls/a/b", "vision.embed/cls/a/b"]
    assert text.honest_place(run, "kfold") == (
        "2 of 4 folds chose vision.layers.5, 1 vision.layers.4, 1 vision.embed (cls, prompt a/b)"
    )
    honest["chosen"] = [*two, "vision.layers.4/cls/city", "vision.embed/cls/a/b"]
    assert text.honest_place(run, "kfold") == (
        "2 of 4 folds chose vision.layers.5, cls, prompt a/b; the others, 2 other places"
    )
    axes = layer_curve(run).axes[0]
    assert not [line for line in axes.lines if line.get_marker() == "*"]
    (line,) = (x for x in axes.lines if x.get_label() == "honest best: folds chose several places")
    assert [float(v) for v in line.get_ydata()] == [honest["r2"]] * 2
    assert [float(v) for v in line.get_xdata()] == [-0.5, 8.5]
    page.write_report(run, tmp_path)
    readme = (tmp_path / "README.md").read_text()
    assert "A black line is the R² of layers chosen on inner folds that differ by fold." in readme
    assert "The star is" not in readme
    honest["r2"] = -17.4
    assert "honest best R² -17.400" in [t.get_text() for t in layer_curve(run).axes[0].texts]
    honest["chosen"] = two
    assert [line for line in layer_curve(run).axes[0].lines if line.get_marker() == "*"]


def capsules(run: Run) -> Run:
    """Sites as a location encoder's: parts that read the same input, and what joins them."""
    sites = run.layers["site"]
    for i, part in enumerate(("capsules.0", "capsules.1")):
        sites = sites.mask(sites == f"vision.layers.{3 * i}", f"location.{part}.embed")
        for j in (1, 2):
            sites = sites.mask(sites == f"vision.layers.{3 * i + j}", f"location.{part}.layers.{j}")
    run.layers["site"] = sites.replace("vision.layers.6", "location.joint")
    run.layers = run.layers[~run.layers["site"].str.startswith("vision")]
    run.info["honest"] = {}
    return run


def test_parts_side_by_side_are_not_joined_by_a_line() -> None:
    run = capsules(example_run(40, blocks=7, pools=("mean:all",)))
    for axes in layer_curve(run).axes:
        curve = next(x for x in axes.lines if x.get_label() == "mean:all, mean")
        gaps = np.flatnonzero(np.isnan(curve.get_ydata())).tolist()
        assert gaps == [3, 7]
        titles = {t.get_text(): float(t.get_position()[0]) for t in axes.texts}
        assert titles == {"capsules.0": 1.0, "capsules.1": 4.0, "joint": 6.0}
        between = [x.get_xdata()[0] for x in axes.lines if x.get_color() == "#d0d0d0"]
        assert between == [2.5, 5.5]


def test_labels_that_would_touch_are_left_out() -> None:
    named = {0.0: "embed", 4.0: "joint", 5.0: "embed", 9.0: "joint"}
    assert figures._apart_from_each_other(named, 0.28) == {0.0: "embed", 4.0: "joint", 9.0: "joint"}
    assert figures._apart_from_each_other(named, 1.0) == named
    run = capsules(example_run(40, blocks=7, pools=("mean:all",)))
    figure = layer_curve(run)
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = [t.get_window_extent() for t in axes.get_xticklabels() if t.get_text()]
        boxes += [t.get_window_extent() for t in axes.texts]
        touching = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
        assert touching == []


def test_a_band_over_all_of_the_axis_is_left_out(tmp_path: Path) -> None:
    run = example_run(40, blocks=4, pools=("cls",), splits=("kfold",))
    run.predictions = pd.DataFrame()
    (band,) = layer_curve(run).axes[0].collections
    assert len(band.get_paths()) == 1
    page.write_report(run, tmp_path)
    assert "left out where they cover" not in (tmp_path / "README.md").read_text()
    run.layers.loc[2, ["r2", "r2_se"]] = [-17.0, 33.0]
    first, second = layer_curve(run).axes[0].collections[0].get_paths()
    assert first.vertices[:, 0].max() == 1
    assert second.vertices[:, 0].min() == 3
    page.write_report(run, tmp_path)
    said = "Bands are ± 1.96 standard errors over folds, left out where they cover the axis."
    assert said in (tmp_path / "README.md").read_text()


def test_every_control_has_a_style_of_its_own() -> None:
    run = with_random_weights(example_run(40, blocks=3, splits=("kfold",)))
    raw = run.layers[run.layers["control"] == "raw pixels"].assign(control="tokens", r2=0.1)
    run.layers = pd.concat([run.layers, raw], ignore_index=True)
    figure = layer_curve(run)
    lines = {str(line.get_label()): line for line in figure.axes[0].lines}
    controls = [lines[f"control: {name}"] for name in ("raw pixels", "random-weights", "tokens")]
    assert [line.get_marker() for line in controls] == ["s", "x", "D"]
    targets = [lines[f"cls, {name}"].get_linestyle() for name in ("latitude", "longitude")]
    assert targets == ["--", ":"]
    assert {line.get_linestyle() for line in controls} == {"-"}


def test_samples_left_out_are_counted_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = example_run(40, blocks=1, splits=("kfold",))
    run.predictions = pd.DataFrame()
    run.info["counts"] = {"read": 40, "skipped": 1, "why": ["a.csv row 1: no latitude"]}
    assert text.skipped(run) == ["Skipped 1 sample", "a.csv row 1: no latitude"]
    why = [f"a.csv row {i}: no latitude" for i in range(7)]
    run.info["counts"] = {"read": 40, "skipped": 7, "why": why}
    folder = run.save(tmp_path / "r")
    assert main(["show", str(folder)]) == 0
    more = "and 2 more, all of them in run.json and report.html"
    assert capsys.readouterr().out.startswith("\n".join(["Skipped 7 samples", *why[:5], more]))
    readme, html = ((folder / name).read_text() for name in ("README.md", "report.html"))
    items = "\n".join(f"- {line}" for line in [*why[:5], more])
    assert f"## Skipped 7 samples\n\n{items}\n" in readme
    assert "".join(f"<li>{reason}</li>" for reason in why) in html
    run.info["counts"] = {"read": 40, "skipped": 0, "why": []}
    assert text.skipped(run) == []
    page.write_report(run, tmp_path)
    assert "Skipped" not in (tmp_path / "README.md").read_text()


def test_long_prompts_have_numbers_and_a_legend(tmp_path: Path) -> None:
    short = example_run(40, blocks=1, prompts=("bare", "city"), splits=("kfold",))
    assert "Prompts" not in short.summary()
    assert text.place(short, "lm.norm", "last", "city") == "lm.norm, last, prompt city"
    asked = ("{name}", "Where on the Earth is {name}?", "Where on the Earth was {name}?")
    run = example_run(40, blocks=1, prompts=asked, pools=("cls",), splits=("kfold",))
    assert [row[1] for row in text.summary_table(run, "kfold").cells] == [
        "1 {name}",
        "2 Where on the Eart…",
        "3 Where on the Eart…",
    ]
    assert text.place(run, "lm.norm", "last", asked[1]) == f"lm.norm, last, prompt 2: {asked[1]}"
    legend = "Prompts\n1: {name}\n2: " + asked[1] + "\n3: " + asked[2]
    assert f"\n\n{legend}\n\n" in run.summary()
    labels = [t.get_text() for t in layer_curve(run).legends[0].get_texts()]
    assert f"cls 3: {asked[2]}" in labels
    run.predictions = pd.DataFrame()
    page.write_report(run, tmp_path)
    assert f"2. `{asked[1]}`\n3. `{asked[2]}`" in (tmp_path / "README.md").read_text()
    assert f'run = gf.open("{tmp_path}")' in (tmp_path / "README.md").read_text()
    assert f"<li>{asked[2]}</li></ol>" in (tmp_path / "report.html").read_text()


def test_prompts_of_several_lines_break_no_table(tmp_path: Path) -> None:
    asked = ("{name}", "{name}\n", "Where\tis\r\n{name} on the Earth?")
    run = example_run(40, blocks=1, prompts=asked, pools=("cls",), splits=("kfold",))
    told = [r"1 {name}", r"2 {name}\n", r"3 Where\tis\r\n{nam…"]
    assert [row[1] for row in text.summary_table(run, "kfold").cells] == told
    assert r"3: Where\tis\r\n{name} on the Earth?" in run.summary()
    run.predictions = pd.DataFrame()
    page.write_report(run, tmp_path)
    readme = (tmp_path / "README.md").read_text()
    assert r"| cls | 2 {name}\n | " in readme
    assert "3. `Where\\tis\\r\\n{name} on the Earth?`" in readme
    assert r"<li>{name}\n</li>" in (tmp_path / "report.html").read_text()


def test_captions_speak_of_what_is_drawn(tmp_path: Path) -> None:
    run = example_run(40, blocks=1, splits=("kfold",))
    run.predictions = pd.DataFrame()
    page.write_report(run, tmp_path)
    readme = (tmp_path / "README.md").read_text()
    assert "Thin lines are controls: raw pixels with grey squares. The star is the la" in readme
    run.layers = run.layers[run.layers["control"] == ""].drop(columns="r2_se")
    run.info["honest"] = {}
    page.write_report(run, tmp_path)
    readme = (tmp_path / "README.md").read_text()
    assert "![Held-out R² by layer.](layers.png)" in readme


def test_the_page_says_how_alpha_was_chosen(tmp_path: Path) -> None:
    run = example_run(60, blocks=1)
    run.info["final_alpha"] = "by the stars"
    page.write_report(run, tmp_path)
    readme = (tmp_path / "README.md").read_text()
    assert "chosen by exact leave-one-out" in readme
    assert "fitted to all samples, their penalty chosen by the stars." in readme


def test_map_needs_places() -> None:
    run = example_run(30)
    run.predictions = run.predictions.drop(columns="error_km")
    assert not figures.has_map(run)
    with pytest.raises(ValueError, match="no held-out predictions of latitude and longitude"):
        map_of_predictions(run)


def test_predicted_places_are_clipped_and_wrapped_as_their_errors_are() -> None:
    latitude, longitude = world.on_map(
        np.array([95.0, -91, 10, 10, 10, 10]), np.array([0.0, 0, 190, -181, 540, 180])
    )
    assert latitude.tolist() == [90, -90, 10, 10, 10, 10]
    assert longitude.tolist() == [0, 0, -170, 179, -180, -180]
    rng = np.random.default_rng(0)
    guess = rng.uniform(-200, 200, (2, 50))
    mapped = world.on_map(guess[0], guess[1])
    expected = great_circle_km(0.0, 0.0, np.clip(guess[0], -90, 90), guess[1])
    np.testing.assert_allclose(great_circle_km(0.0, 0.0, *mapped), expected, rtol=1e-9)


def test_map_shows_at_most_400_samples_and_the_short_way_round() -> None:
    run = example_run(1000, blocks=1, splits=("kfold",))
    run.predictions.loc[0, ["longitude", "longitude_predicted"]] = [170.0, 200.0]
    axes = map_of_predictions(run).axes[0]
    lines, dots = axes.collections
    assert len(dots.get_offsets()) == 400
    ends = np.array(lines.get_segments())[:, :, 0]
    assert np.abs(np.diff(ends)).max() <= 180
    assert [170.0, 200.0] in ends.tolist()


def test_map_closes_in_on_a_region() -> None:
    whole = pd.Series([-170.0, 170.0]), pd.Series([-60.0, 60.0])
    assert world.window(*whole) == (-180, -90, 360)
    brazil = pd.Series([-73.0, -35.0]), pd.Series([-33.0, 5.0])
    west, south, width = world.window(*brazil)
    assert width == 1.5 * 2 * 38
    assert west < -73
    assert west + width > -35
    assert south < -33
    assert south + width / 2 > 5
    pole = pd.Series([175.0, 179.0]), pd.Series([84.0, 88.0])
    assert world.window(*pole) == (150, 75, 30)


def test_land_is_where_land_is() -> None:
    land = np.asarray(Image.open(world.LAND))
    assert land.shape == (720, 1440)
    assert world.LAND.stat().st_size < 20_000

    def at(latitude: float, longitude: float) -> bool:
        return bool(land[int((90 - latitude) * 4), int((longitude + 180) * 4)])

    dry = {"Paris": (48.8, 2.3), "Manaus": (-3, -60), "Greenland": (72, -40)}
    dry |= {"South Pole": (-89, 0), "Sydney": (-33.5, 150.5), "Yakutsk": (62, 129)}
    wet = {"Pacific": (0, -140), "Atlantic": (30, -40), "Arctic": (88, 0)}
    wet |= {"Caspian": (42, 50.5), "Hudson": (58, -85), "Superior": (47.7, -87.5)}
    assert {name for name, place in dry.items() if not at(*place)} == set()
    assert {name for name, place in wet.items() if at(*place)} == set()
    area = np.cos(np.radians(90 - (np.arange(720) + 0.5) / 4))
    assert 0.28 < (land.mean(axis=1) * area).sum() / area.sum() < 0.30  # 29.2 % of the Earth


# ---------------------------------------------------------------- pages


def test_html_stands_alone(saved: Path) -> None:
    html = (saved / "report.html").read_text(encoding="utf-8")
    words = re.sub(r"base64,[^\"]*", "", html)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<script|<link|<iframe", words)
    sources = re.findall(r"""(?:src|href)=["']([^"']{0,30})""", html)
    assert len(sources) == 2
    assert all(s.startswith("data:image/png;base64,") for s in sources)
    run = geofast.run.open(saved)
    assert all(f'<td class="word">{site}</td>' in html for site in run.layers["site"].unique())
    assert run.summary().splitlines()[0] in html
    assert "finding where a person is" in html
    assert ".partial-" not in html


def test_readme_shows_the_pictures_and_how_to_open_the_run(saved: Path) -> None:
    readme = (saved / "README.md").read_text(encoding="utf-8")
    pictures = re.findall(r"\]\(([^)]+)\)", readme)
    assert pictures == ["layers.png", "map.png"]
    assert all((saved / name).exists() for name in pictures)
    assert f'run = gf.open("{saved}")' in readme
    assert "by exact leave-one-out" in readme
    assert "5 (15-degree blocks)" in readme
    assert "aggregate" in readme or "many samples at once" in readme
    run = geofast.run.open(saved)
    assert " ".join(finding(run)) in readme


def test_pages_open_the_run_by_the_path_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = example_run(40, blocks=1, splits=("kfold",))
    run.predictions = pd.DataFrame()
    run.save("runs/dino")
    for name in ("README.md", "report.html"):
        page = (tmp_path / "runs" / "dino" / name).read_text(encoding="utf-8")
        assert 'run = gf.open("runs/dino")' in page.replace("&quot;", '"')
    geofast.run.open("runs/dino")


def test_pages_escape_what_users_named(tmp_path: Path) -> None:
    run = example_run(40, blocks=1, prompts=("<b>|{city}|</b>",), splits=("kfold",))
    run.info["data"] = "<script>alert(1)</script>"
    run.predictions = pd.DataFrame()
    path = run.save(tmp_path / "r")
    html = (path / "report.html").read_text(encoding="utf-8")
    assert "<script>" not in html
    assert "&lt;b&gt;|{city}|&lt;/b&gt;" in html
    assert "<b>\\|{city}\\|</b>" in (path / "README.md").read_text(encoding="utf-8")


def test_a_failing_picture_warns_and_keeps_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(run: Run) -> None:
        raise ZeroDivisionError("drawn by nobody")

    monkeypatch.setattr(figures, "layer_curve", fail)
    run = example_run(40, blocks=1)
    with pytest.warns(
        UserWarning, match=r"layers\.png could not be made: ZeroDivisionError: drawn"
    ):
        path = run.save(tmp_path / "r")
    again = geofast.run.open(path)
    assert again.info["warnings"] == [
        "layers.png could not be made: ZeroDivisionError: drawn by nobody"
    ]
    assert not (path / "layers.png").exists()
    assert (path / "map.png").exists()
    assert "drawn by nobody" in (path / "README.md").read_text(encoding="utf-8")


def test_without_matplotlib_all_but_the_pictures_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [m for m in sys.modules if m.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = example_run(40, blocks=1)
    with pytest.raises(ImportError, match=r"pip install matplotlib"):
        layer_curve(run)
    with pytest.warns(UserWarning, match=r"no pictures: .*pip install matplotlib") as caught:
        path = run.save(tmp_path / "r")
    assert len(caught) == 1
    assert not list(path.glob("*.png"))
    assert (path / "report.html").exists()
    assert "pip install matplotlib" in geofast.run.open(path).info["warnings"][0]


def test_pages_say_only_what_is_known(tmp_path: Path) -> None:
    run = example_run(40, blocks=1)
    run.info.clear()
    run.predictions = pd.DataFrame()
    page.write_report(run, tmp_path)
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert readme.startswith("# the model on the data: 40 samples, 2 sites\n")
    run.layers = run.layers[run.layers["site"] == run.layers["site"].iloc[0]]
    assert text.headline(run) == "the model on the data: 40 samples, 1 site"
    assert "It ran with" not in readme
    assert "penalty" not in readme
    assert "None" not in readme
    assert "nan" not in readme


def test_import_is_light_and_drawing_leaves_pyplot_alone() -> None:
    script = (
        "import sys, geofast.report\n"
        "assert not {'matplotlib', 'transformers', 'triton'} & set(sys.modules)\n"
        "from test_run import example_run\n"
        "import matplotlib\n"
        "before = matplotlib.rcParams.copy()  # reading them all would load pyplot\n"
        "geofast.report.layer_curve(example_run(30, blocks=1))\n"
        "geofast.report.map_of_predictions(example_run(30, blocks=1))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert matplotlib.rcParams.copy() == before\n"
    )
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", script], cwd=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
