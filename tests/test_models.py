import pytest
import tiny
import torch
from torch import nn

import geofast as gf
from geofast.models import describe, find_towers, match_sites


@pytest.mark.parametrize(
    ("make", "tower", "blocks", "prefix", "pool"),
    [
        (tiny.dinov2, "vision", 3, ("cls",), "cls"),
        (tiny.vit, "vision", 2, ("cls",), "cls"),
        (tiny.clip_vision, "vision", 2, ("cls",), "cls"),
        (tiny.llama, "lm", 3, (), "last"),
        (tiny.gpt2, "lm", 2, (), "last"),
        (tiny.bert, "text", 2, (), "mean:text"),
    ],
)
def test_towers_are_found_by_structure(make, tower, blocks, prefix, pool):
    (found,) = find_towers(make())
    assert (found.name, len(found.blocks), found.prefix) == (tower, blocks, prefix)
    assert found.default_pool == pool
    assert make is tiny.bert or found.norm is not None


def test_registers_are_told_from_patches():
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    config = Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_register_tokens=4
    )
    (tower,) = find_towers(Dinov2WithRegistersModel(config))
    assert tower.prefix == ("cls", *["register"] * 4)


def test_sites_and_globs():
    towers = find_towers(tiny.llama())
    assert [s.name for s in match_sites(towers)] == [
        "lm.embed",
        *(f"lm.layers.{i}" for i in range(3)),
    ]
    assert [s.name for s in match_sites(towers, "lm.layers.[12]")] == ["lm.layers.1", "lm.layers.2"]
    assert [s.name for s in match_sites(towers, ["lm.norm", "lm.layers.0.attn"])] == [
        "lm.layers.0.attn", "lm.norm",
    ]  # fmt: skip
    assert match_sites(towers, "lm.layers.1")[0].layer == 1
    with pytest.raises(
        ValueError,
        match=r"no site matches 'lm.layer.1'; this model has lm.embed, lm.layers.0 to .2",
    ):
        match_sites(towers, "lm.layer.1")


def test_branches_add_up_to_the_block():
    model = tiny.llama()
    with (
        gf.capture(model, ["lm.layers.0", "lm.layers.1", "lm.layers.1.*"], "last") as rows,
        torch.no_grad(),
    ):
        model(input_ids=torch.arange(5)[None] + 2)
    total = rows["lm.layers.0/last"] + rows["lm.layers.1.attn/last"] + rows["lm.layers.1.mlp/last"]
    torch.testing.assert_close(total, rows["lm.layers.1/last"])


def test_a_module_without_blocks_says_what_was_looked_for():
    with pytest.raises(
        ValueError, match="no residual blocks found in Linear: looked for a ModuleList"
    ):
        find_towers(nn.Linear(3, 3))


class Plain(nn.Module):
    """A model of nobody's: blocks in a Sequential, points in."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inside = nn.Linear(2, 16)
        self.blocks = nn.Sequential(
            *[nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.LayerNorm(16)) for _ in range(3)]
        )

    def forward(self, points):
        return self.blocks(self.inside(points))


def test_any_module_with_a_prepare_function():
    model = gf.load(Plain(), prepare=lambda points: {"points": torch.tensor(points)})
    points = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    with gf.capture(model, "*.layers.2", "mean") as rows:
        model.forward(model.prepare(points))
    (key,) = rows
    torch.testing.assert_close(rows[key], model.module(torch.tensor(points)).detach())
    with pytest.raises(ValueError, match="needs prepare="):
        gf.load(Plain())


@pytest.fixture
def checkpoints(tmp_path):
    from transformers import BitImageProcessorPil

    tiny.dinov2().save_pretrained(tmp_path / "vision")
    BitImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    ).save_pretrained(tmp_path / "vision")
    tiny.llama().save_pretrained(tmp_path / "lm")
    tiny.tokenizer().save_pretrained(tmp_path / "lm")
    tiny.bert().save_pretrained(tmp_path / "bert")
    tiny.tokenizer().save_pretrained(tmp_path / "bert")
    return tmp_path


def test_load_a_vision_folder(checkpoints):
    from PIL import Image

    model = gf.load(checkpoints / "vision")
    assert (model.name, model.kind, model.dtype) == ("vision", "image", torch.float32)
    batch = model.prepare([Image.new("RGB", (50, 40), "red"), Image.new("RGB", (30, 60))])
    assert batch["pixel_values"].shape == (2, 3, 28, 28)
    text = describe(model)
    assert "vision.layers.2" in text
    assert "5 x 32" in text
    assert "1 cls, then patch" in text


def test_load_a_language_model_folder(checkpoints):
    model = gf.load(f"hf:{checkpoints / 'lm'}", dtype=torch.bfloat16)
    assert (model.kind, model.dtype) == ("text", torch.bfloat16)
    assert not any("head" in name for name, _ in model.body.named_modules())
    batch = model.prepare(["w1 w2 w3", "w4"])
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    with pytest.raises(ValueError, match="the model takes 64"):
        model.prepare(["w1 " * 65])
    with pytest.raises(ValueError, match="has no token"):
        model.prepare(["w1", ""])


def test_what_cannot_be_loaded(checkpoints, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        gf.load(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="is a folder without a Hugging Face checkpoint"):
        gf.load(tmp_path / "empty")
    with pytest.raises(ValueError, match="neither a vision encoder nor a causal language model"):
        gf.load(checkpoints / "bert")


def test_images_of_different_sizes_are_refused():
    from geofast.models.model import stack_images

    with pytest.raises(ValueError, match="images of different sizes in one batch"):
        stack_images([torch.zeros(3, 4, 4), torch.zeros(3, 4, 5)])
