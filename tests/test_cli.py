import json

import numpy as np
import pandas as pd
import pytest
import tiny
from transformers import BitImageProcessorPil

from geofast.cli import main


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


def test_probe_writes_a_run_and_prints_it(job, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["probe", str(job / "model"), str(job / "photos.csv"), "--out", str(out)]
    options = ["--pool", "cls", "mean:patch", "--split", "kfold", "blocks:30", "--workers", "0"]
    assert main([*arguments, *options]) == 0
    printed = capsys.readouterr().out
    assert "vision.layers" in printed
    assert str(out / "map.png") in printed
    info = json.loads((out / "run.json").read_text())
    assert info["counts"]["read"] == 30
    assert info["arguments"]["split"] == ["kfold", "blocks30"]
    assert len(pd.read_csv(out / "layers.csv")) == 4 * 2 * 2
    assert main(["show", str(out)]) == 0
    assert "vision.layers" in capsys.readouterr().out
    assert main([*arguments, *options]) == 1
    assert "is there already; choose another --out, or pass --overwrite" in capsys.readouterr().err


def test_sites(job, capsys):
    assert main(["sites", str(job / "model")]) == 0
    printed = capsys.readouterr().out
    assert "vision.layers.2.attn" in printed
    assert "1 cls, then patch" in printed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--sites", "lm.*"], "no site matches 'lm.*'; this model has vision.embed"),
        (["--split", "kfold:40"], "40"),
        (["--latitude", "lat"], "lat"),
        (["--targets", "height"], "height"),
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
