"""`geofast steer` and `geofast locate`: what they hand on, what they write, and bad input."""

import json
from dataclasses import replace
from importlib import import_module

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from PIL import Image
from test_report_steering import example

import geofast as gf
from geofast import cli
from geofast.cli import main
from geofast.effects.arms import CONTROLS
from geofast.geo.gazetteer import Entry, Gazetteer


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A tiny model that talks, cities, a run of theirs under a prompt, and pairs."""
    folder = tmp_path_factory.mktemp("job")
    module = tiny.llama()
    module.generation_config.eos_token_id = None
    module.save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    r = np.random.default_rng(0)
    cities = pd.DataFrame(
        {
            "id": [f"c{i}" for i in range(24)],
            "name": [f"w{i}" for i in range(24)],
            "land": [f"w{40 + i}" for i in range(24)],
            "latitude": r.uniform(-60, 60, 24),
            "longitude": r.uniform(-170, 170, 24),
        }
    )
    cities.to_csv(folder / "cities.csv", index=False)
    run = gf.probe(
        str(folder / "model"), gf.data.read(folder / "cities.csv"), prompts="w90 {name} w91",
        pool="last", split=gf.KFold(2), alphas=[1.0], check=False,
    )  # fmt: skip
    run.save(folder / "run")
    pairs = pd.DataFrame({"source": ["c1", "c2", "c3"], "target": ["c2", "c5", "c1"]})
    pairs.to_csv(folder / "pairs.csv", index=False)
    pairs.assign(target="nobody").to_csv(folder / "bad.csv", index=False)
    Image.new("RGB", (8, 8)).save(folder / "p.png")
    cities.assign(p="p.png").to_csv(folder / "images.csv", index=False)
    (folder / "experiment").mkdir()
    (folder / "experiment" / "steering.json").write_text("{}")
    replace(run, rows=None, grams=None, path=None).save(folder / "bare")
    return folder


def arguments(job, *more, command="steer"):
    out = ["--out", str(job / "out")] if command == "steer" else []
    return [
        command, str(job / "model"), "--run", str(job / "run"), "--pairs", str(job / "pairs.csv"),
        *out, *more,
    ]  # fmt: skip


@pytest.fixture
def names(monkeypatch):
    """The gazetteer of the index, as a few words."""
    module = import_module("geofast.data.demos.gazetteer")
    few = Gazetteer([Entry("country", f"w{i}") for i in range(100)])
    monkeypatch.setattr(module, "gazetteer", lambda: few)


@pytest.fixture
def asked(monkeypatch):
    """What `steer` and `locate` were asked, instead of an answer."""
    given = {}

    def steer(**more):
        given.update(more)
        return example(8, shares=(0.4,), controls=("random dims",))

    for name in ("experiment.steer", "locate.locate"):
        module, function = name.split(".")
        there = import_module(f"geofast.effects.{module}")
        monkeypatch.setattr(there, function, steer)
    return given


def test_steer_asks_as_the_run_did_and_prints_what_it_found(job, names, capsys):
    more = ["--country", "land", "--all-pairs", "--site", "lm.layers.0", "--share", ".5", "1"]
    few = ["--control", "random-dims", "--max-new-tokens", "3", "--batch-size", "2"]
    assert main(arguments(job, *more, *few)) == 0
    printed = capsys.readouterr().out
    pages = ("effects.png", "map.png", "readings.png", "report.html")
    assert printed.splitlines()[:4] == [str(job / "out" / name) for name in pages]
    found = json.loads((job / "out" / "steering.json").read_text())
    assert found["site"] == "lm.layers.0"
    assert found["pairs"]["kept"] == 3
    table = pd.read_csv(job / "out" / "summary.csv")
    assert list(table["arm"]) == ["none", "edit", "random dims", "edit"]
    told = (job / "out" / "report.html").read_text()
    assert "The first source is asked: &#x27;w90 w1 w91&#x27;" in told
    assert "model" in printed
    assert max(map(len, printed.splitlines()[4:])) <= 100
    assert main(arguments(job, *more, *few)) == 1
    assert "holds an experiment already; pass --overwrite" in capsys.readouterr().err
    assert main(["show", str(job / "out")]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("command", ["steer", "locate"])
def test_a_runs_folder_takes_nothing_else(job, asked, capsys, command):
    more = ["--overwrite"] if command == "steer" else []
    assert main(arguments(job, "--out", str(job / "run"), *more, command=command)) == 1
    assert "is a run's folder, where nothing else may lie" in capsys.readouterr().err


def test_show_says_where_runs_are(job, tmp_path, capsys):
    assert main(["show", str(job)]) == 1
    assert "holds no run itself: show one of those inside, " in (said := capsys.readouterr().err)
    assert "run" in said.rpartition("inside, ")[2].split(", ")[-1]
    assert main(["show", str(tmp_path)]) == 1
    assert "it has no run.json" in capsys.readouterr().err


_WRONG = [
    (["--pairs", "nowhere.csv"], 1, "there is no file of pairs nowhere.csv"),
    (["--pairs", "{job}"], 1, "there is no file of pairs {job}"),
    (["--pairs", "{job}/bad.csv"], 1, "has no sample 'nobody', the target"),
    (["--run", "nowhere"], 1, "there is no folder "),
    (["--run", "{job}/experiment"], 1, "holds an experiment, not a run: gf.open_steered"),
    (["--data", "nowhere.csv"], 1, "no such file or folder: nowhere.csv"),
    (["--data", "{job}/images.csv", "--image", "p"], 1, "the run read text, and "),
    (["--share", "x"], 2, "argument --share: invalid float value: 'x'; see geofast {command}"),
    (["--mode", "add"], 2, "argument --mode: invalid choice: 'add'"),
    (["--role", "sky"], 1, "role must be one of last, all"),
    (["--prompt", "w1 {{name}}"], 1, "the run was never asked 'w1 {{name}}'"),
    (["--country", "state"], 1, "has no column 'state'; it has id"),
    (["--seed", "-1"], 2, "argument --seed: must be a whole number from 0, got '-1'"),
    (["--ranking", "forward", "--run", "{job}/bare"], 1, "keeps neither rows nor statistics"),
]
_WRONG_OF = {
    "steer": [
        *_WRONG,
        (["--site", "lm.layers.9"], 1, "the run never probed a site 'lm.layers.9'; it has lm.emb"),
        (["--share", "2"], 1, "shares must be 0 to 1"),
        (["--control", "magic"], 2, "argument --control: invalid choice: 'magic'"),
    ],
    "locate": [
        *_WRONG,
        (["--sites", "lm.layers.9"], 1, "the run never probed a site 'lm.layers.9'; it has lm.emb"),
        (["--share", "2"], 1, "shares must be above 0 and at most 1; got [2.0]"),
        (["--country", "latitude"], 1, "a name must be text; column 'latitude' has "),
        (["--out", "{job}/pairs.csv"], 1, "is a file: --out takes a folder"),
    ],
}


@pytest.mark.parametrize(
    ("command", "change", "code", "message"),
    [(command, *one) for command, every in _WRONG_OF.items() for one in every],
)
def test_what_is_asked_wrongly_is_one_line_before_the_model_is_loaded(
    job, tmp_path, names, monkeypatch, capsys, command, change, code, message
):
    def never(*_, **__):
        raise AssertionError("loaded")

    for module in ("experiment", "locate"):
        monkeypatch.setattr(f"geofast.effects.{module}.load", never)
    change = ["--out", str(tmp_path / "out"), *(word.format(job=job) for word in change)]
    try:
        found = main(arguments(job, "--country", "land", *change, command=command))
    except SystemExit as left:
        found = left.code
    said = [line for line in capsys.readouterr().err.splitlines() if not line.endswith(" ...")]
    assert found == code
    assert len(said) == 1
    assert said[0].startswith("geofast: ")
    assert message.format(job=job, command=command) in said[0]
    assert not (tmp_path / "out").exists()


def test_every_option_is_handed_on(job, tmp_path, asked, monkeypatch):
    chosen = {
        "--data": job / "cities.csv", "--place": "name", "--region": "r", "--country": "land",
        "--continent": "c", "--prompt": "w90 {name} w91", "--role": "last", "--ranking": "coef",
        "--seed": 3, "--batch-size": 7, "--site": "lm.layers.1", "--mode": "set",
        "--phase": "both", "--protocol": "study", "--max-new-tokens": 9, "--out": tmp_path / "o",
        "--device": "cpu",
    }  # fmt: skip
    words = [str(word) for pair in chosen.items() for word in pair]
    assert main(arguments(job, *words, "--share", ".1", ".3", "--control")) == 0
    run, data = (asked.pop(name) for name in ("run", "data"))
    assert run.path == job / "run"
    assert data.table["id"].tolist() == [f"c{i}" for i in range(24)]
    assert asked == {
        "model": str(job / "model"), "device": "cpu", "dtype": None, "device_map": None,
        "adapter": None, "merge": False, "trust_remote_code": False,
        "pairs": str(job / "pairs.csv"), "role": "last", "ranking": "coef", "seed": 3,
        "batch_size": 7, "prompt": "w90 {name} w91", "site": "lm.layers.1", "shares": [0.1, 0.3],
        "mode": "set", "phase": "both", "controls": [], "keep": "known", "protocol": "study",
        "names": {"place": "name", "region": "r", "country": "land", "continent": "c"},
        "max_new_tokens": 9, "progress": True,
    }  # fmt: skip


def test_locate_is_asked_what_was_said(job, asked):
    assert main(arguments(job, command="locate")) == 0
    assert asked["model"] == str(job / "model")  # which it loads when all else is right
    assert asked["names"] == {"country": "country"}  # codes are names there, as for steer
    more = ["--country", "land", "--sites", "lm.*", "--mode", "swap", "set", "--share", "0.2"]
    assert main(arguments(job, *more, "--dtype", "bfloat16", command="locate")) == 0
    assert asked["prompt"] is None
    assert asked["dtype"] == torch.bfloat16
    assert (asked["names"], asked["sites"], asked["shares"], asked["modes"]) == (
        {"country": "land"}, ["lm.*"], [0.2], ["swap", "set"],
    )  # fmt: skip


def test_controls_are_those_that_there_are():
    assert tuple(name.replace("-", " ") for name in cli._CONTROLS) == CONTROLS


def test_samples_that_are_not_the_runs(job, tmp_path, capsys):
    assert main(arguments(job, "--id", "name", "--out", str(tmp_path / "out"))) == 1
    said = capsys.readouterr().err
    assert "has no sample 'c0', and the run has: if it was read otherwise, say --id" in said


def test_a_folder_of_something_else_is_left_alone(job, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(arguments(job, "--out", str(tmp_path), "--overwrite")) == 1
    assert "is not a run's folder; choose another path" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
