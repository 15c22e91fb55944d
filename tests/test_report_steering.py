from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from geofast.effects import outcome
from geofast.effects.arms import CONTROLS, OTHER_DIMS
from geofast.effects.outcome import Steered, open_steered, summarise, summarise_readings
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
    shares: tuple[float, ...] = (0.8, 0.1, 0.2, 0.4),
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
    arms = [("none", 0.0)]
    for s in sorted(shares):
        arms += [(a, s) for a in ("edit", *controls) if s < 1 or a not in OTHER_DIMS]
    luck = r.uniform(size=n)
    rows = [
        _row(r, *pair, arm, share, moves.get(arm, 0) * min(1, 1.5 * share), luck[i])
        for arm, share in arms
        for i, pair in enumerate(pairs)
    ]
    truths = ["to_country", "own_country", "moved", "kept"]
    table = pd.DataFrame(rows).astype(dict.fromkeys(truths, "boolean"))
    said: dict[str, object] = {
        "model": "hf:org/small-lm", "data": "/somewhere/cities.csv", "run": "runs/lm",
        "site": "lm.layers.7", "pool": "last", "prompt": "", "role": "last", "phase": "both",
        "mode": "swap", "shares": list(shares), "ranking": "coef_std", "controls": list(controls),
        "left_out": {}, "read_at": "lm.layers.20", "names": {"country": "country"},
        "level": "country", "keep": "known", "protocol": "corrected", "seed": 0,
        "pairs": {
            "asked": n + 12, "kept": n,
            "left_out": {"unedited, the model does not name the source's country": 12},
        },
        "samples": {
            i: {
                "asked": f"The city of {name} is in",
                "names": {"place": [name], "country": ALIASES.get(country, [country])},
                "answer": f"{country}. It is a city by the sea.",
            }
            for i, (name, country, _, _) in CITIES.items()
        },
        "device": "cpu", "dtype": "float32",
    }  # fmt: skip
    return Steered(table, summarise(table), later_readings(table), said | info)


def later_readings(pairs: pd.DataFrame) -> pd.DataFrame:
    """Readings of four sites: an edit begins where the unedited model ends and sinks in."""
    before = pairs.loc[pairs["arm"] == "none", "km"].to_numpy()
    parts = []
    for site, layer in enumerate((8, 12, 16, 20)):
        weight = (site + 1) / 4
        away = pairs["km"] * weight + np.tile(before, len(pairs) // len(before)) * (1 - weight)
        parts.append(pairs[KEYS].assign(site=f"lm.layers.{layer}", km=away))
    return summarise_readings(pd.concat(parts))


KEYS = ["source", "target", "arm", "share"]


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


@pytest.fixture(scope="module", autouse=True)
def fewer_draws() -> Iterator[None]:
    """Intervals and p-values are not what is tested here, and ten thousand draws take time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outcome, "bootstrap_means", partial(outcome.bootstrap_means, draws=200))
        patch.setattr(outcome, "sign_flip", partial(outcome.sign_flip, draws=200))
        yield


@pytest.fixture(scope="module")
def several(fewer_draws: None) -> Steered:
    return example(30, shares=(0.8, 0.2))


def change(made: Steered, arm: str, **columns: object) -> Steered:
    """Put numbers into all rows of an arm."""
    pairs = made.pairs.copy()
    for name, value in columns.items():
        pairs.loc[pairs["arm"] == arm, name] = value
    return Steered(pairs, summarise(pairs), made.readings, made.info)


# ---------------------------------------------------------------- the finding


def test_the_finding_is_true_of_the_numbers(several: Steered) -> None:
    first, odds, read, damage = steering_text.finding(several)
    table = several.summary.set_index(["arm", "share"])
    rates = (100 * table["moved"]).round().astype(int)
    low, high = (round(100 * table[f"moved_{end}"]["edit", 0.8]) for end in ("low", "high"))
    assert first == (
        "With 80 % of the dimensions of lm.layers.7 swapped, small-lm names the target's place in "
        f"{rates['edit', 0.8]} % of 30 answers (95 % interval {low} to {high}), more "
        f"than with every control: random dims {rates['random dims', 0.8]} %, random "
        f"direction {rates['random direction', 0.8]} %, shuffled labels "
        f"{rates['shuffled labels', 0.8]} % and mean difference {rates['mean difference', 0.8]} %."
    )
    assert f"are {table['log_odds']['edit', 0.8]:.2f} nats (unedited " in odds
    assert f"{table['km']['edit', 0.8]:,.0f} km from the target (unedited " in read
    assert f"KL {table['kl']['edit', 0.8]:.3f} nats (random dims " in damage


def test_what_controls_do_as_well_is_not_claimed() -> None:
    alike = dict.fromkeys(CONTROLS, STRENGTH["edit"])
    made = example(30, shares=(0.8,), strength=alike)
    first = steering_text.finding(made)[0]
    assert ", no more than with its controls: random dims 63 %, random direction 63 %" in first
    one = example(30, shares=(0.8,), strength={"mean difference": 0.78})
    first = steering_text.finding(one)[0]
    assert ", more than with random dims " in first
    assert re.search(r" and shuffled labels \d+ %, but not clearly more than with mean diff", first)


def test_the_finding_is_of_the_first_share_asked_for_and_claims_what_its_test_says() -> None:
    """Six pairs that differ: p = .031; five: .063."""
    made = example(30, shares=(0.8,), controls=("random dims",))
    made = change(made, "random dims", moved=False)
    moved = made.pairs.index[made.pairs["arm"] == "edit"]
    made.pairs.loc[moved, "moved"] = np.arange(30) < 6
    once = Steered(made.pairs, summarise(made.pairs), made.readings, made.info)
    assert once.summary.set_index("arm")["moved_p"]["edit"] == pytest.approx(2 / 2**6)
    assert steering_text.clearly_more(once, 0.8, "random dims")
    assert "more than with every control: random dims 0 %." in steering_text.finding(once)[0]
    less = made.pairs[made.pairs["share"] > 0].assign(share=0.2)
    less.loc[less["arm"] == "edit", "moved"] = np.arange(30) < 5
    both = pd.concat([made.pairs, less], ignore_index=True)
    for shares, share in (([0.2, 0.8], 0.2), ([0.8, 0.2], 0.8), ([0, 0.8, 0.2], 0.8)):
        info = made.info | {"shares": shares}
        twice = Steered(both, summarise(both), made.readings, info)
        assert steering_text.shown_share(twice) == share
        first = steering_text.finding(twice)[0]
        assert first.startswith(f"With {100 * share:.0f} % of")
        assert ("not clearly more" in first) == (share == 0.2)


def test_an_edit_that_never_moves_an_answer_says_so() -> None:
    made = example(20, shares=(0.4,), strength=dict.fromkeys(STRENGTH, 0))
    first = steering_text.finding(made)[0]
    assert (
        "small-lm never names the target's place (20 answers, 95 % interval 0 to 17 %), no" in first
    )
    alone = example(20, shares=(0.4,), controls=(), mode="set")
    first = steering_text.finding(alone)[0]
    assert first.startswith("With the reading at lm.layers.7 set to the target in 40 % of the dim")
    assert first.endswith("; no control was run, so any edit may do as much.")


def test_answers_that_tell_nothing_are_not_counted(several: Steered) -> None:
    pairs = several.pairs.copy()
    trivial = pairs["source"] == "oslo"
    pairs.loc[trivial, "moved"] = pd.NA
    left = len(pairs[(pairs["arm"] == "none") & ~trivial])
    first = steering_text.finding(Steered(pairs, summarise(pairs), several.readings, several.info))[
        0
    ]
    assert f"% of {left} answers" in first
    pairs["moved"] = pd.array([pd.NA] * len(pairs), "boolean")
    first = steering_text.finding(Steered(pairs, summarise(pairs), several.readings, several.info))[
        0
    ]
    assert first.startswith("The log odds of the target's name")


# ---------------------------------------------------------------- pictures


def test_lines_are_the_summary_and_bars_its_intervals(several: Steered) -> None:
    figure = steering_figures.effect_and_damage(several)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    titles = [axes.get_title(loc="left") for axes in panels]
    assert [t.split(":")[0] for t in titles] == [
        "Effect", "Effect", "Damage", "Answers that name the target's place, over damage",
    ]  # fmt: skip
    table = several.summary[several.summary["arm"] == "edit"]
    for axes, measure in zip(panels, ("moved", "log_odds", "kl", "moved"), strict=True):
        lines = {line.get_label(): line for line in axes.get_lines()}
        assert {"edit", *(f"control: {c}" for c in CONTROLS)} <= set(lines)
        np.testing.assert_allclose(lines["edit"].get_ydata(), table[measure])
        ends = np.array(axes.collections[0].get_segments())[:, :, 1]
        if axes is not panels[3]:
            np.testing.assert_allclose(ends, table[[f"{measure}_low", f"{measure}_high"]])
    over = {line.get_label(): line for line in panels[3].get_lines()}
    np.testing.assert_allclose(over["edit"].get_xdata(), table["kl"])
    styles = [(line.get_color(), line.get_marker()) for line in list(over.values())[:5]]
    assert len({c for c, _ in styles}) == len({m for _, m in styles}) == 5


def test_one_share_has_panels_over_damage_alone() -> None:
    figure = steering_figures.effect_and_damage(example(10, shares=(0.4,)))
    labels = [axes.get_xlabel() for axes in figure.axes]
    assert labels == ["damage: KL from the unedited model, nats"] * 2


def test_arrows_end_where_the_probe_reads(several: Steered) -> None:
    from matplotlib.patches import FancyArrowPatch

    figure = steering_figures.map_of_readings(several)
    for axes, arm in zip(figure.axes, ("edit", "random dims"), strict=False):
        rows = steering_text.of_arm(several, arm, 0.8).head(steering_figures.MAP_PAIRS)
        arrows = [p._posA_posB for p in axes.patches if isinstance(p, FancyArrowPatch)]
        assert len(rows) <= len(arrows) <= 2 * len(rows)  # twice where it crosses the date line
        starts, ends = (np.array([a[i] for a in arrows]) for i in range(2))
        there = rows[["reading_longitude", "reading_latitude"]].to_numpy()
        for place in there:
            off = (ends - place + [180, 0]) % 360 - [180, 0]
            assert np.abs(off).sum(1).min() < 1e-9
        assert np.abs((ends - starts)[:, 0]).max() <= 180
    assert "Control: random dims: 24 of 30 pairs drawn, mean " in figure.axes[1].get_title("left")


def test_without_readings_there_is_no_map(several: Steered) -> None:
    pairs = several.pairs.assign(reading_latitude=np.nan, reading_longitude=np.nan, km=np.nan)
    made = Steered(pairs, summarise(pairs), several.readings, several.info | {"read_at": ""})
    assert not steering_figures.has_map(made)
    assert len(steering_text.finding(made)) == 3
    assert "km" not in steering_text.effect_table(made).headers


# ---------------------------------------------------------------- later sites


def test_readings_are_means_in_the_order_of_the_pass() -> None:
    r = np.random.default_rng(1)
    rows = [
        {"source": f"s{pair}", "target": "t", "arm": arm, "share": share, "site": site,
         "km": r.uniform(100, 9000)}
        for arm, share in (("none", 0.0), ("edit", 0.1), ("edit", 0.9))
        for site in ("lm.layers.9", "lm.layers.10", "lm.norm")
        for pair in range(7)
    ]  # fmt: skip
    long = pd.DataFrame(rows)
    long.loc[[0, 7], "km"] = np.nan
    table = summarise_readings(long)
    assert [*table.columns] == [*outcome.READINGS]
    assert table["site"].tolist() == ["lm.layers.9", "lm.layers.10", "lm.norm"] * 3
    assert table["n"].tolist() == [6, 6, *[7] * 7]
    found = table.set_index(["arm", "share", "site"])
    for key, part in long.groupby(["arm", "share", "site"]):
        assert found["km"][key] == pytest.approx(part["km"].mean())
        low, high = outcome.bootstrap_means(part[["km"]])
        assert [found[f"km_{end}"][key] for end in ("low", "high")] == pytest.approx([*low, *high])
    empty = summarise_readings(pd.DataFrame())
    assert empty.empty
    assert [*empty.columns] == [*table.columns]
    assert empty.dtypes.tolist() == table.dtypes.tolist()


def test_lines_over_later_sites_are_the_readings(several: Steered) -> None:
    figure = steering_figures.readings_of_sites(several)
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert set(lines) == {"unedited", "edit", *(f"control: {c}" for c in CONTROLS)}
    assert lines["unedited"].get_linestyle() == "--"
    for arm, label in (("none", "unedited"), ("edit", "edit"), ("random dims",) * 2):
        rows = steering_text.readings_of(several, arm, 0.8)
        line = lines.get(label) or lines[f"control: {label}"]
        np.testing.assert_allclose(line.get_ydata(), rows["km"])
    edit = steering_text.readings_of(several, "edit", 0.8)
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert {*edit["km_low"], *edit["km_high"]} <= {*band}
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert names[::-1] == ["lm.layers.8", "lm.layers.12", "lm.layers.16", "lm.layers.20"]
    said = f"probes read {edit['km'].iloc[0]:,.0f} km from the target at lm.layers.8 and"
    assert said in steering_text.readings_title(several)


def test_a_single_later_site_has_no_picture_of_its_own(several: Steered, tmp_path: Path) -> None:
    one = several.readings[several.readings["site"] == "lm.layers.20"]
    made = Steered(several.pairs, several.summary, one, dict(several.info))
    assert not steering_text.has_readings(made)
    assert "later sites" not in str(made)
    steering.write(made, tmp_path)
    assert not (tmp_path / "readings.png").exists()
    assert "later sites read" not in (tmp_path / "README.md").read_text()


def test_words_of_many_sites_and_arms_fit_a_terminal(several: Steered) -> None:
    every = [several.readings.assign(site=f"vision.blocks.{i:02}.attention.out") for i in range(40)]
    long = pd.concat(every)[lambda t: ~t.duplicated(["arm", "share", "site"])]
    made = Steered(several.pairs, several.summary, long, several.info)
    said = str(made)
    assert max(map(len, said.splitlines())) <= 100
    assert "more column" not in said
    assert said.count("vision.blocks.") == 8
    assert "vision.blocks.00." in said
    assert "vision.blocks.39." in said
    assert len(steering_text.readings_table(made).cells) == 40
    rows = steering_text.effect_table(several, narrow=True).cells
    assert [row[:2] for row in rows[:2]] == [["unedited", "0 %"], ["edit", "20 %"]]


# ---------------------------------------------------------------- all dimensions


def test_where_all_dimensions_are_edited_other_dimensions_are_no_control() -> None:
    made = example(20, shares=(1.0, 0.4))
    assert steering_text.shown_share(made) == 1
    assert steering_text.shown_control(made) == "random direction"
    assert not {"random dims", "shuffled labels"} & {*steering_text.controls(made, 1.0)}
    by = made.summary.set_index(["arm", "share"])
    assert np.isnan(by["moved_p"]["edit", 1.0])
    assert by["moved_p"]["edit", 0.4] < 0.2
    first = steering_text.finding(made)[0]
    assert "with every control: random direction 0 % and mean difference" in first
    heads = list(steering_text.examples(made)[0].answers)
    assert heads[-1] == "source, random direction"
    said = "No control 'random dims' at a share of 100 %: there it is the edit itself."
    assert said in steering_text.left_out(made)
    assert said in str(made)
    assert steering_text.left_out(example(8, shares=(0.4,)))[1:] == []
    for draw in ("effect_and_damage", "map_of_readings", "readings_of_sites"):
        getattr(steering_figures, draw)(made)


def test_without_any_control_of_other_dimensions_nothing_is_tested() -> None:
    made = example(8, shares=(1.0,), controls=OTHER_DIMS, mode="patch")
    assert steering_text.controls(made) == []
    assert "p" not in steering_text.effect_table(made).headers
    assert "and p against" not in str(made)
    assert "no control is another edit at this share" in steering_text.finding(made)[0]
    assert not any(line.startswith("p: ") for line in steering._method(made))
    steering_figures.effect_and_damage(made)
    assert "Unedited: 8 pairs" in steering_figures.map_of_readings(made).axes[1].get_title("left")


def test_one_pair_has_rates_with_ends_and_numbers_alone() -> None:
    made = example(1, shares=(0.4,))
    rows = {row[0]: row for row in steering_text.effect_table(made).cells}
    assert rows["unedited"][3] == "0 (0 to 98)"
    assert re.fullmatch(r"-?\d+\.\d\d", rows["edit"][5])
    for draw in ("effect_and_damage", "map_of_readings", "readings_of_sites"):
        getattr(steering_figures, draw)(made)


# ---------------------------------------------------------------- the folder


def test_readings_are_saved_and_older_folders_refused(several: Steered, tmp_path: Path) -> None:
    made = Steered(several.pairs, several.summary, several.readings, dict(several.info))
    folder = made.save(tmp_path / "out")
    again = open_steered(folder)
    pd.testing.assert_frame_equal(again.readings, several.readings)
    assert str(again) == str(several)
    about = folder / "steering.json"
    about.write_text(about.read_text().replace('"geofast_steering": 2', '"geofast_steering": 1'))
    with pytest.raises(ValueError, match=r"written in format 1; .* reads 2: run the experiment ag"):
        open_steered(folder)
    about.write_text(about.read_text().replace('"geofast_steering": 1', '"geofast_steering": 3'))
    with pytest.raises(ValueError, match=r"written in format 3; .* reads 2: upgrade it"):
        open_steered(folder)


# ---------------------------------------------------------------- examples


def test_examples_are_the_first_pairs_whatever_became_of_them(several: Steered) -> None:
    found = steering_text.examples(several, 5)
    rows = steering_text.of_arm(several, "edit", 0.8).head(5)
    first = [CITIES[s] for s in rows["source"]]
    assert [one.source for one in found] == [f"{name}, {country}" for name, country, *_ in first]
    heads = ["source, unedited", "target, unedited", "source, edited", "source, random dims"]
    assert all([*one.answers] == heads for one in found)
    assert [one.answers["source, edited"].text for one in found] == rows["answer"].tolist()
    moved = [one.answers["source, edited"].verdict for one in found]
    assert [("target's country" in v) for v in moved] == rows["moved"].tolist()
    assert False in rows["moved"].tolist()
    assert True in rows["moved"].tolist()


def test_names_are_marked_as_whole_words_and_other_words_are_harmless() -> None:
    one = steering_text.Example(
        "Lyon, France", "Denver, United States", ("Lyon", "France"),
        ("Denver", "United States", "US"), {},
    )  # fmt: skip
    answer = "<b>Usual</b> france, the united states (US) & Lyonnais"
    marked = steering._marked(answer, one, steering.escape, "[{}]", "({})")
    expected = "&lt;b&gt;Usual&lt;/b&gt; (france), the [united states] ([US]) &amp; Lyonnais"
    assert marked == expected


# ---------------------------------------------------------------- pages


@pytest.fixture(scope="module")
def folder(several: Steered, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("steered")
    several.info["left_out"] = {"mean difference": "the run keeps no rows"}
    steering.write(several, made, "runs/moved")
    several.info["left_out"] = {}
    return made


def test_the_page_needs_no_other_file(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "effects.png", "map.png", "readings.png", "report.html",
    ]  # fmt: skip
    page = (folder / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 3
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)", page)
    assert "http" not in page
    assert "/somewhere" not in page.partition("<details>")[0]
    assert page.startswith("<!doctype html>")


def test_both_pages_say_what_was_found_and_what_it_is_for(folder: Path, several: Steered) -> None:
    finding = " ".join(steering_text.finding(several))
    readme, page = ((folder / name).read_text() for name in ("README.md", "report.html"))
    for words in (
        "Swap at lm.layers.7 of small-lm: 30 pairs of cities.csv",
        "12 pairs left out: unedited, the model does not name the source",
        "The first 6 pairs of the table, whatever became of them",
        "not a tool for finding where a person is",
        "evidence about the model",
        f"The city of {CITIES[several.pairs['source'].iloc[0]][0]} is in",
        "runs/moved",
    ):
        assert words in readme
        assert words in page
    assert finding in readme
    assert '<mark class="target">' in page
    assert "No control &#x27;mean difference&#x27;: the run keeps no rows" in page
    rows = len(several.summary)
    assert readme.count("\n| edit |") == 2 * 2
    read = 4 + len(several.readings)
    assert page.count('<tr><td class="word">') == 3 * rows + read  # effect, damage, everything


def test_without_matplotlib_the_pages_have_no_pictures(
    several: Steered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    made = Steered(several.pairs, several.summary, several.readings, dict(several.info))
    with pytest.warns(UserWarning, match="no pictures: figures need matplotlib"):
        steering.write(made, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "report.html"]
    assert "Warning: the report has no pictures" in (tmp_path / "report.html").read_text()


def test_the_studys_scores_have_a_table() -> None:
    made = example(10, shares=(0.4,))
    assert steering_text.study_table(made) is None
    scores = {f"study_{name}": name == "stability" for name in ("stability", "efficacy", "success")}
    pairs = made.pairs.assign(**scores, study_known=True)
    table = steering_text.study_table(Steered(pairs, summarise(pairs), made.readings, made.info))
    assert table is not None
    assert table.headers == ["arm", "share", "n", "stability, %", "efficacy, %", "success, %"]
    assert table.cells[1] == ["edit", "40 %", "10", "100 (69 to 100)", "0 (0 to 31)", "0 (0 to 31)"]


if __name__ == "__main__":  # to look at the pages: python tests/test_report_steering.py FOLDER
    out = Path(sys.argv[1])
    for name, made in {"several": example(), "one": example(shares=(0.4,))}.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        steering.write(made, out / name)
