"""The README's loop of another tool, run as it stands there."""

import re
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import tiny
import torch
from PIL import Image
from transformers import BitImageProcessorPil

import geofast

README = Path(__file__).parent.parent / "README.md"


def test_the_backend_page_runs():
    page = r"## As a backend\n.*?```python\n(.*?)```"
    (section,) = re.findall(page, README.read_text(), re.DOTALL)
    ids = torch.randint(2, 8, (80, 6), generator=torch.Generator().manual_seed(0))
    model = tiny.llama()
    names = {
        "model": model.requires_grad_(False),
        "batches": [{"input_ids": part} for part in ids.split(16)],
        "places": model.model.embed_tokens(ids[:, -1])[:, :2].double() * 100,
        "fold": torch.arange(80) % 5,
    }
    exec(section, names)
    assert names["solution"].r2.shape == (5, 2)
    assert names["exact"].predictions.shape == (80, 2)
    assert names["probe"].predict(names["x"]).shape == (80, 2)
    assert float(names["exact"].r2.mean()) > 0.5


def test_your_own_page_runs(tmp_path, monkeypatch):
    page = r"## Probe your own\n.*?```python\n(.*?)```"
    (section,) = re.findall(page, README.read_text(), re.DOTALL)
    assert section.count("facebook/dinov2-small") == 2
    monkeypatch.chdir(tmp_path)
    tiny.dinov2().save_pretrained("model")
    size = {"height": 28, "width": 28}
    BitImageProcessorPil(size=size, crop_size=size).save_pretrained("model")
    places = pd.DataFrame(np.random.default_rng(0).uniform(-80, 80, (40, 2)).round(3))
    places.columns = ["latitude", "longitude"]
    for i, (latitude, longitude) in enumerate(places.to_numpy().astype(int) + 90):
        Image.new("RGB", (28, 28), (int(latitude), int(longitude), 90)).save(f"{i}.png")
    places.assign(image=[f"{i}.png" for i in range(40)]).to_csv("photos.csv", index=False)
    Image.open("7.png").save("new.jpg", format="PNG")  # as JPEG its colours would differ
    section = section.replace("facebook/dinov2-small", "model")
    section, last = section.rstrip().rsplit("\n", 1)
    names = {}
    exec(section, names)
    run, found = names["run"], eval(last, names)
    expected = run.best(run.rows[run.best.name][7:8])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-2)


def test_text_is_read_as_the_page_says(tmp_path):
    (call,) = re.findall(
        r"`gf\.probe\(model, (gf\.data\.read\(.*?\)), prompts=", README.read_text()
    )
    table = tmp_path / "cities.csv"
    pd.DataFrame({"name": ["Oslo"], "latitude": [59.9], "longitude": [10.7]}).to_csv(table)
    samples = eval(call.replace("cities.csv", str(table)), {"gf": geofast})
    assert samples.kind == "text"
    assert samples.load(0) == "Oslo"


def test_the_commands_of_the_readme_exist():
    from geofast.cli import _parser

    blocks = re.findall(r"```sh\n(.*?)```", README.read_text(), re.DOTALL)
    text = "".join(blocks).replace("\\\n", " ")
    lines = re.findall(r"^geofast (.*)$", text, re.MULTILINE)
    said = {"probe", "plan", "sites", "doctor", "show", "locate", "steer"}
    assert {line.split()[0] for line in lines} == said
    for line in lines:
        _parser().parse_args(shlex.split(line, comments=True))
