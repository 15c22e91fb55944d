import json
import os
import re
import subprocess
import sys
from importlib import import_module
from types import SimpleNamespace

import families
import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from test_run import example_run
from transformers import BitImageProcessorPil

import geofast as gf
from geofast import __version__
from geofast.cli import main
from geofast.effects.locate import _MEASURED, Located
from geofast.subspace import of_grams


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A tiny checkpoint and 30 photos with a table."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("job")
    tiny.dinov2().save_pretrained(folder / "model")
    processor = BitImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    processor.save_pretrained(folder / "model")
    r = np.random.default_rng(0)
    places = []
    for i in range(30):
        lat, lon = r.uniform(-80, 80), r.uniform(-170, 170)
        colour = (int(lat + 90), int((lon + 180) / 2), 90)
        Image.new("RGB", (40, 40), colour).save(folder / f"{i}.jpg")
        places.append({"image": f"{i}.jpg", "latitude": lat, "longitude": lon})
    pd.DataFrame(places).to_csv(folder / "photos.csv", index=False)
    return folder


def test_probe_writes_a_run_and_prints_it(job, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(job)
    out = tmp_path / "run"
    arguments = ["probe", "model", "photos.csv", "--out", str(out)]
    options = ["--pool", "cls", "mean:patch", "--split", "kfold", "blocks:30", "--workers", "0"]
    assert main([*arguments, *options]) == 0
    printed, told = capsys.readouterr()
    stages = [line for line in told.splitlines() if line.endswith(" ...")]
    assert stages == [
        "loading model ...",
        "checking the model on a few samples ...",
        "solving 8 site x pool in 2 cross-validation(s) ...",
    ]
    assert "vision.layers" in printed
    assert str(out / "map.png") in printed
    last = printed.rpartition("\n\n")[2].replace("\n", " ").strip()
    assert re.fullmatch(r"model (does not )?reads? .*R².* .*random folds\)\.", last)
    said = [line for line in printed.splitlines() if not line.startswith(str(tmp_path))]
    assert max(map(len, said)) <= 100
    info = json.loads((out / "run.json").read_text())
    assert info["counts"]["read"] == 30
    assert (info["model"], info["data"]) == ("model", "photos.csv")
    assert info["sources"] == {"model": str(job / "model"), "data": str(job / "photos.csv")}
    assert list(info["arguments"]["split"]) == ["kfold", "blocks30"]
    assert len(pd.read_csv(out / "layers.csv")) == 4 * 2 * 2
    assert main(["show", str(out)]) == 0
    assert "vision.layers" in capsys.readouterr().out
    assert main([*arguments, *options]) == 1
    assert "holds a run already; pass overwrite=True (--overwrite)" in capsys.readouterr().err


def test_sites(job, capsys):
    assert main(["sites", str(job / "model")]) == 0
    printed = capsys.readouterr().out
    assert "vision.embed to vision.layers.2 (4) " in printed
    assert "vision.layers.0.attn to vision.layers.2.attn (3) " in printed
    assert "1 cls, then patch\n" in printed
    assert "model: image in, float32\n" in printed
    assert len(printed.splitlines()) == 8


def test_sites_of_a_model_that_talks(tmp_path, capsys):
    folder = families.save(families.llava, tmp_path / "llava")
    assert main(["sites", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "llava: image with a prompt or text in, float32\n" in printed
    assert "projector: at 'multi_modal_projector'; tokens: patch\n" in printed
    assert "'language_model.layers'; tokens: image and text\n" in printed
    assert "lm.embed to lm.layers." in printed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--sites", "lm.*"], "no site matches 'lm.*'; this model has vision.embed"),
        (["--split", "kfold:40"], "40"),
        (["--latitude", "lat"], "lat"),
        (["--targets", "height"], "height"),
        (["--split", "blocks:30", "--folds", "1"], "a split needs at least 2 folds, got 1"),
        (["--seed", "-1"], "Seed must be between 0 and"),
        (["--split", "kfold:30"], "too few samples (1), R² needs two"),
        (["--split", "kfold:2", "--select", "folds"], "needs at least 3 folds, and split 'kfold'"),
        (["--device", "cuda"], "no GPU for device='cuda'"),
        (["--alphas", "0", "1"], "alphas must be positive numbers; got [0.0, 1.0]"),
        (["--id", "photo"], "has no column 'photo'"),
        (["--prompt", "in {image}"], "takes no prompt beside an image"),
    ],
)
def test_an_error_is_one_line_and_leaves_nothing(job, tmp_path, capsys, change, message):
    out = tmp_path / "run"
    code = main(["probe", str(job / "model"), str(job / "photos.csv"), "--out", str(out), *change])
    said = capsys.readouterr().err.splitlines()[-1]
    assert code == 1
    assert said.startswith("geofast: ")
    assert message in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--pool", "median"], "unknown pool 'median': write cls, last, mean, max, min or each"),
        (["--sites", "embed"], "no site matches 'embed'; this model has vision.embed"),
        (["--prompt", "Where?"], "takes no prompt beside an image"),
        (["--text", "image"], "reads image, not text"),
        (["--pool", "mean:text"], "pool 'mean:text': vision has no text token, but cls and patch"),
    ],
)
def test_what_a_model_cannot_do_is_told_before_its_weights_are_loaded(
    job, tmp_path, capsys, monkeypatch, change, message
):
    monkeypatch.setattr(import_module("geofast.probe"), "load", stop)
    out = tmp_path / "run"
    arguments = ["probe", str(job / "model"), str(job / "photos.csv"), "--out", str(out)]
    assert main([*arguments, *change]) == 1
    assert message in capsys.readouterr().err
    assert main(arguments) == 1
    assert "the pass began" in capsys.readouterr().err


def test_a_pool_that_a_language_model_has_no_token_for(tmp_path, capsys):
    folder = families.save(families.llava, tmp_path / "model")
    table = tmp_path / "texts.csv"
    rows = [f"w{i},{5 * i},{i}" for i in range(12)]
    table.write_text("\n".join(["text,latitude,longitude", *rows]))
    arguments = ["probe", str(folder), str(table), "--out", str(tmp_path / "run"), "--pool"]
    assert main([*arguments, "mean", "cls"]) == 1
    said = "geofast: pool 'cls': lm has no cls token, but text; use last or mean\n"
    assert capsys.readouterr().err.endswith(said)
    assert main([*arguments, "mean:image"]) == 1
    assert "lm has no image token, but text; use last or mean\n" in capsys.readouterr().err


def test_a_missing_model_and_a_missing_table(job, tmp_path, capsys):
    assert (
        main(
            [
                "probe",
                str(tmp_path / "absent"),
                str(job / "photos.csv"),
                "--out",
                str(tmp_path / "run"),
            ]
        )
        == 1
    )
    assert "there is no folder" in capsys.readouterr().err
    assert (
        main(["probe", str(job / "model"), str(tmp_path / "a.csv"), "--out", str(tmp_path / "run")])
        == 1
    )
    assert "a.csv" in capsys.readouterr().err


def test_ids_alphas_and_groups_reach_the_run(job, tmp_path, capsys):
    table = pd.read_csv(job / "photos.csv")
    table.assign(id="same", name=[f"p{i}" for i in range(30)], zone=["few"] * 3 + ["many"] * 27)[
        ["id", "name", "image", "latitude", "longitude", "zone"]
    ].to_csv(job / "named.csv", index=False)
    out = tmp_path / "run"
    arguments = ["probe", str(job / "model"), str(job / "named.csv"), "--out", str(out)]
    options = ["--sites", "vision.layers.2", "--workers", "0", "--group", "zone"]
    assert main([*arguments, *options]) == 1
    assert "choose another column with id=... (--id)" in capsys.readouterr().err
    assert main([*arguments, *options, "--id", "name", "--alphas", "1", "100"]) == 0
    printed = capsys.readouterr().out
    assert "Warning: Groups left out: few (kfold)" in printed
    assert re.search(r"^many +vision\.layers\.2 +cls +27 ", printed, re.MULTILINE)
    info = json.loads((out / "run.json").read_text())
    assert info["arguments"]["alphas"] == [1, 100]
    assert pd.read_csv(out / "samples.csv")["id"].tolist()[:2] == ["p0", "p1"]


def test_folds_and_seed_reach_every_split(job, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["probe", str(job / "model"), str(job / "photos.csv"), "--out", str(out)]
    options = ["--sites", "vision.layers.2", "--workers", "0", "--folds", "3", "--seed", "7"]
    splits = ["--split", "kfold", "kfold:4", "blocks:30", "group:id"]
    assert main([*arguments, *options, *splits]) == 1
    assert "two splits have the same name: kfold, kfold" in capsys.readouterr().err
    assert main([*arguments, *options, *splits[:1], *splits[2:]]) == 0
    info = json.loads((out / "run.json").read_text())
    assert info["arguments"]["split"] == {
        "kfold": "KFold(folds=4, seed=7)",
        "blocks30": "Blocks(degrees=30.0, folds=3, seed=7)",
        "group:id": "GroupKFold(column='id', folds=3, seed=7)",
    }


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda out: (out.mkdir(), (out / "mine.txt").write_text("x")), "is not a run's folder"),
        (lambda out: out.write_text("x"), "is not a run's folder"),
        (lambda out: out.parent.write_text("x"), "cannot be made: .*below is not a folder"),
        (lambda out: out.parent.symlink_to("/proc/foo"), "cannot be made: /proc takes no folder"),
    ],
)
def test_an_out_that_cannot_be_is_refused_before_anything_is_read(
    tmp_path, capsys, make, message, options
):
    out = tmp_path / "below" / "run"
    if "cannot be made" not in message:
        out.parent.mkdir()
    make(out)
    code = main(["probe", "no model", str(tmp_path / "no.csv"), "--out", str(out), *options])
    assert code == 1
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(("storage", "needed"), [("rows", 30 * 32 * 4), ("gram", 8 * 5 * 35**2)])
def test_a_full_disk_is_told_before_the_pass(job, tmp_path, capsys, monkeypatch, storage, needed):
    free = [needed - 1]
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free[0]))
    monkeypatch.setattr(import_module("geofast.probe"), "extract", stop)
    arguments = ["probe", str(job / "model"), str(job / "photos.csv"), "--storage", storage]
    arguments += ["--sites", "vision.layers.2", "--out", str(tmp_path / "below" / "run")]
    assert main(arguments) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    size = f"{needed / 1e6:.1f} MB"
    assert f"the run will need {size} in {tmp_path}, where {size} are free; make room" in said
    assert list(tmp_path.iterdir()) == []
    free[0] = needed
    assert main(arguments) == 1
    assert "the pass began" in capsys.readouterr().err


def stop(*_, **__):
    raise RuntimeError("the pass began")


def test_a_demo_replaces_a_run_only_when_told_to(job, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("geofast.demo.cities", stop)
    out = example_run(30, blocks=1).save(tmp_path / "run")
    before = (out / "run.json").read_text()
    assert main(["demo", "cities", "--out", str(out)]) == 1
    assert "holds a run already; pass overwrite=True (--overwrite)" in capsys.readouterr().err
    assert main(["demo", "cities", "--out", str(out), "--overwrite"]) == 1
    assert "the pass began" in capsys.readouterr().err
    assert (out / "run.json").read_text() == before


def test_show_of_what_is_no_run(tmp_path, capsys):
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    gram = gf.Gram(6, 2, 4).update(x, x[:, :2].double(), torch.arange(40) % 4)
    searched = of_grams({"a/cls": gram}, ["latitude", "longitude"], random=2)
    sub = searched.save(tmp_path / "sub")
    assert main(["show", str(sub)]) == 0
    assert capsys.readouterr().out == f"{sub}/subspace.png\n{sub}/subspace.html\n\n{searched}\n"
    ends = [f"{name}{end}" for name in _MEASURED for end in ("", "_low", "_high")]
    row = {"site": "lm.layers.1", "mode": "swap", "share": 0.2, **dict.fromkeys(ends, 1.25)}
    info = {"target_effect": 3.0, "target_damage": 1.0, "budget": 2.0}
    info["pairs"] = {"used": 8, "alike": 0}
    located = Located(pd.DataFrame([row]), info)
    assert main(["show", str(located.save(tmp_path / "loc"))]) == 0
    assert capsys.readouterr().out == f"{located}\n"
    (tmp_path / "loc" / "locate.json").rename(tmp_path / "loc" / "patching.json")
    assert main(["show", str(tmp_path / "loc")]) == 1
    assert "holds what patching found" in capsys.readouterr().err
    (tmp_path / "loc" / "patching.json").unlink()
    assert main(["show", str(tmp_path / "loc")]) == 1
    assert "is not a run's folder" in capsys.readouterr().err


def test_a_reader_that_has_enough_is_no_error(tmp_path):
    out = example_run(30, blocks=1).save(tmp_path / "run")
    read, write = os.pipe()
    os.close(read)
    script = "import sys; from geofast.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", script, "show", str(out)], stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND; see geofast --help"),
        (["probe", "m"], "the following arguments are required: data, --out; see geofast probe"),
        (["probe", "m", "d", "--out", "o", "--workers", "-1"], "a whole number from 0, got '-1'"),
        (["probe", "m", "d", "--out", "o", "--device", "gpu"], "write cpu, cuda or cuda:N, got"),
        (["demo", "mars"], "invalid choice: 'mars' (choose from"),
    ],
)
def test_a_wrong_command_is_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.startswith("geofast: ")
    assert said.count("\n") == 1
    assert message in said


def test_version_and_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"geofast {__version__}\n"
    with pytest.raises(SystemExit):
        main(["probe", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    for option in ("--pool POOL", "--select", "--storage", "--device DEVICE", "--dtype", "--work"):
        assert re.search(rf"{option}.*?\(default: ", words.partition("what is read")[2])


def test_an_empty_out_is_free(job, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    options = ["--out", str(out), "--sites", "vision.layers.2", "--workers", "0"]
    assert main(["probe", str(job / "model"), str(job / "photos.csv"), *options]) == 0
    assert (out / "run.json").exists()


@pytest.mark.parametrize("value", ["0", "-3", "x", "1.5"])
@pytest.mark.parametrize(
    "command", [["demo", "cities", "--samples"], ["probe", "m", "d", "--out", "o", "--batch-size"]]
)
def test_counts_are_whole_numbers_from_one(capsys, command, value):
    with pytest.raises(SystemExit):
        main([*command, value])
    assert f"must be a whole number from 1, got {value!r}" in capsys.readouterr().err


def test_a_damaged_run_is_one_line(job, tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--out", str(out), "--sites", "vision.layers.2", "--workers", "0"]
    assert main(["probe", str(job / "model"), str(job / "photos.csv"), *options]) == 0
    capsys.readouterr()
    probes = bytearray((out / "probe.safetensors").read_bytes())
    probes[8:40] = bytes(32)
    (out / "probe.safetensors").write_bytes(probes)
    assert main(["show", str(out)]) == 1
    assert "probe.safetensors is damaged" in capsys.readouterr().err
    (out / "run.json").write_text('{"geofast_run": 1}')
    assert main(["show", str(out)]) == 1
    assert "run.json is not a geofast run's, or not all of it" in capsys.readouterr().err


def test_the_doctor_and_a_control(job, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        main(["doctor", str(job / "model")])
    assert left.value.code == 1  # nobody trained it
    said = capsys.readouterr().out
    assert "pass  hidden_states  every site is the same" in said
    assert "fail  weights" in said
    out = tmp_path / "run"
    asked = ["--control", "random-weights", "--out", str(out), "--overwrite"]
    assert main(["probe", str(job / "model"), str(job / "photos.csv"), *asked]) == 0
    assert "random-weights" in capsys.readouterr().out
    assert set(gf.open(out).layers["control"]) == {"", "random-weights"}


def test_the_doctor_takes_examples_from_data(job, tmp_path, capsys):
    arguments = ["doctor", str(job / "model"), "--dtype", "bfloat16", "--data"]
    with pytest.raises(SystemExit):
        main([*arguments, str(job / "photos.csv")])
    said = " ".join(capsys.readouterr().out.split())
    assert "R² of 30 samples moves by at most" in said
    assert re.search(r"R² at vision\.\S+ \d\.\d{3}, of the twin \d", said)
    table = pd.read_csv(job / "photos.csv").rename(columns={"image": "shot"})
    table.to_csv(job / "shots.csv", index=False)
    assert main([*arguments, str(job / "shots.csv"), "--image", "place"]) == 1
    assert "has no column 'place'" in capsys.readouterr().err


def test_raw_pixels_as_a_control(job, tmp_path, capsys):
    out = tmp_path / "run"
    probe = ["probe", str(job / "model"), str(job / "photos.csv"), "--out", str(out)]
    assert main([*probe, "--control", "tokens"]) == 1
    assert "the control 'tokens' is for samples of kind text" in capsys.readouterr().err
    assert main([*probe, "--control", "pixels", "random-weights"]) == 0
    printed = capsys.readouterr().out
    assert re.search(
        r"median km +random +pixels$|median km +pixels +random$", printed, re.MULTILINE
    )
    table = pd.read_csv(out / "layers.csv", keep_default_na=False)
    assert set(table["control"]) == {"", "pixels", "random-weights"}
    assert (table["r2:pixels"][table["control"] == ""] != "").all()


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_run_outlives_its_reader(job, tmp_path, closed):
    """As of `geofast probe ... 2>&1 | head`: what took hours is in the folder."""
    out = tmp_path / "run"
    read, write = os.pipe()
    os.close(read)
    script = "import sys; from geofast.cli import main; sys.exit(main(sys.argv[1:]))"
    probe = ["probe", str(job / "model"), str(job / "photos.csv"), "--out", str(out)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {closed: write}
    done = subprocess.run([sys.executable, "-c", script, *probe, "--workers", "0"], **streams)
    os.close(write)
    assert done.returncode == 0
    assert len(gf.open(out).layers) == 4


def test_a_demo_with_other_penalties(tmp_path, monkeypatch):
    given = []

    def note(samples, **more):
        given.append((samples, more))
        raise ValueError("seen")

    monkeypatch.setattr("geofast.demo.satellite", note)
    place = ["--out", str(tmp_path / "run")]
    main(["demo", "satellite", "--samples", "9", *place])
    main(["demo", "satellite", "--alphas", "1e-5", "1", *place])
    assert given == [(9, {}), (None, {"alphas": [1e-5, 1.0]})]
