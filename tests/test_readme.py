"""The README's loop of another tool, run as it stands there."""

import re
import shlex
from pathlib import Path

import tiny
import torch

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


def test_the_commands_of_the_readme_exist():
    from geofast.cli import _parser

    blocks = re.findall(r"```sh\n(.*?)```", README.read_text(), re.DOTALL)
    text = "".join(blocks).replace("\\\n", " ")
    lines = re.findall(r"^geofast (.*)$", text, re.MULTILINE)
    assert len(lines) == 4
    for line in lines:
        _parser().parse_args(shlex.split(line, comments=True))
