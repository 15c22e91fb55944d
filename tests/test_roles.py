"""What tokens are, and where in the image they come from: by experiment, family by family."""

from contextlib import ExitStack

import families
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

import geofast as gf

SIZES = ((32, 32), (64, 64), (32, 64))  # height and width; no tile is resampled but the thumbnails
ALL = (*families.VISION_FAMILIES, *families.COMPARING_FAMILIES, *families.TALKING_FAMILIES)
# PaliGemma's processor hands numpy what it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def name_of(family):
    return family.__name__


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    made = {}

    def of(family):
        if needed := families.NEEDS.get(family.__name__):
            pytest.importorskip(needed, reason=f"transformers' processor needs {needed}")
        if family not in made:
            made[family] = gf.load(families.save(family, tmp_path_factory.mktemp(family.__name__)))
        return made[family]

    return of


# ------ where tokens come from


def boxes_of(family, size):
    """Where every tile lies in an image of `size`: top, left, height, width in its pixels."""
    height, width = size
    whole, name = (0, 0, height, width), family.__name__
    if name in ("dinov2", "dinov2_registers", "clip", "llava") and width > height:
        return [(0, 16, 32, 32)]  # cropped at the centre
    if name == "sam":
        return [(0, 0, max(size), max(size))]  # padded at the right and at the bottom
    if name in ("llava_next", "llava_onevision"):
        tiles = [(0, -16, 32, 32), (0, 16, 32, 32)] if size == (32, 32) else cut(size, 32)
        return [whole, *tiles]  # a small image is padded at the left and at the right
    if name == "internvl":
        return [*cut(size, 32), whole] if max(size) > 32 else [whole]
    if name in ("idefics3", "smolvlm"):
        return [*cut(size, max(size) // 2), whole]
    return [whole]


def cut(size, side):
    return [(y, x, side, side) for y in range(0, size[0], side) for x in range(0, size[1], side)]


def parts_that_mix_tokens(blocks):
    """Attention, and convolutions over more than a patch."""
    inside = [m for block in blocks for m in block.modules()]
    for module in inside:
        wide = isinstance(module, nn.Conv2d) and module.groups > 1
        if wide or type(module).__name__.endswith("Attention"):
            yield module


def silence(_module, _args, output):
    (output[0] if isinstance(output, tuple) else output).zero_()


def states_of(model, sites, images):
    """Hidden states [tokens, dim] of every site, in the order of the table."""
    seen = {}
    with ExitStack() as hooks:
        for tower in model.towers:
            if tower.name == "vision":
                for module in parts_that_mix_tokens(tower.blocks):
                    hooks.callback(module.register_forward_hook(silence).remove)
        for site in sites:
            note = lambda hidden, name=site.name: seen.update({name: hidden.clone()})  # noqa: E731
            hooks.callback(site.watch(note).remove)
        model.until(sites).forward(model.prepare(images))
    channels_first = {t.name: t.channels_first for t in model.towers}
    for site in sites:
        x = seen[site.name]
        x = x.flatten(2).mT if x.ndim == 4 and channels_first[site.tower] else x
        seen[site.name] = x.reshape(-1, x.shape[-1]).float()
    return seen


def photo(size, mask=None):
    """A smooth picture, brighter where `mask` says."""
    y, x = np.mgrid[: size[0], : size[1]]
    grey = 40 + 60 * (y + 2 * x) / (size[0] + 2 * size[1])
    grey = grey + (100 * mask if mask is not None else 0)
    return Image.fromarray(np.repeat(grey[..., None], 3, 2).astype(np.uint8))


def stripes(size, box, cells, axis, bit):
    """Mask [height, width] of the cells of `box` along `axis` whose number has a bit."""
    y, x = (np.arange(size[a]) - box[a] for a in (0, 1))
    inside = ((y >= 0) & (y < box[2]))[:, None] & ((x >= 0) & (x < box[3]))
    number = np.broadcast_to((y[:, None], x)[axis] * cells // box[axis + 2], size)
    return (number >> bit & 1) * inside


def check_places(model, sizes, boxes, wanted):
    """Hold the places of tokens to an experiment.

    With nothing that mixes tokens, a token changes when its part of the image does and no other.
    Cells of a grid whose number has a certain bit are made brighter: together, the bits that make
    a token change are its row or its column. `boxes` gives the tiles of every image.
    """
    sites = model.sites(wanted)
    plain = [photo(size) for size in sizes]
    table = gf.tokens(model, plain, wanted)
    before = states_of(model, sites, plain)
    bright = states_of(model, sites, [photo(size, np.ones(size)) for size in sizes])
    most = {n: (bright[n] - before[n]).norm(dim=1) for n in before}
    for name in before:
        of_image = torch.tensor((table[table["site"] == name]["tile"] >= 0).to_numpy())
        assert of_image.any()
        least = 1e-4 * most[name].max()
        assert (most[name][~of_image] < least).all(), f"{name}: a token has no place, but changes"
    patches = table[table["tile"] >= 0]
    assert [set(t["tile"]) for _, t in patches.groupby("sample")] == [
        {*range(len(b))} for b in boxes
    ]
    grids = patches.groupby(["sample", "site", "tile"], sort=False)[["row", "column"]].max() + 1
    plans = [[] for _ in sizes]  # of every sample: tile, cells, axis, bit
    for (sample, _site, tile), grid in grids.iterrows():
        for axis, cells in enumerate(grid):
            plan = [(boxes[sample][tile], cells, axis, bit) for bit in range(cells.bit_length())]
            plans[sample] += [p for p in plan if p not in plans[sample]]
    found = pd.DataFrame(0, index=table.index, columns=["row", "column"])
    for turn in range(max(map(len, plans))):
        now = [p[turn] if turn < len(p) else None for p in plans]
        masks = [stripes(size, *n) if n else None for size, n in zip(sizes, now, strict=True)]
        after = states_of(model, sites, [photo(*p) for p in zip(sizes, masks, strict=True)])
        for site in before:
            change = (after[site] - before[site]).norm(dim=1) / most[site].clamp(min=1e-30)
            here = table[table["site"] == site]
            for sample, place in enumerate(now):
                if place is None:
                    assert (
                        float(change[torch.tensor((here["sample"] == sample).to_numpy())].max())
                        < 1e-4
                    )
                    continue
                box, cells, axis, bit = place
                for tile in (t for t, b in enumerate(boxes[sample]) if b == box):
                    along = ("row", "column")[axis]
                    if (sample, site, tile) in grids.index and grids.loc[
                        (sample, site, tile), along
                    ] == cells:
                        mine = (here["sample"] == sample) & (here["tile"] == tile)
                        on = (change > 0.5).numpy() & mine.to_numpy()
                        found.loc[here.index[on], along] += 1 << bit
    inside = patches[[reaches(p, boxes, sizes, grids) for p in patches.itertuples()]]
    assert set(inside["sample"]) == {*range(len(sizes))}
    pd.testing.assert_frame_equal(
        found.loc[inside.index], inside[["row", "column"]], check_dtype=False
    )


@pytest.mark.parametrize("family", ALL, ids=name_of)
def test_places_are_where_tokens_change(load, family):
    model = load(family)
    model = model.asking(["w1 w2"]) if model.prompts else model
    names = [s.name for s in model.every_site]
    wanted = [n for n in names if n in ("vision.embed", "projector", "lm.embed")]
    wanted += [n for n in names if n.startswith("vision.layers.") and n.count(".") == 2]
    sizes = SIZES
    if family is families.dinov3_convnext:  # before its first stage every pixel is a token
        wanted, sizes = wanted[1:], [(2 * h, 2 * w) for h, w in SIZES]
    check_places(model, sizes, [boxes_of(family, size) for size in sizes], wanted)


def reaches(patch, boxes, sizes, grids):
    """Whether a patch lies in the image, and not in what pads it."""
    box, size = boxes[patch.sample][patch.tile], sizes[patch.sample]
    grid = grids.loc[(patch.sample, patch.site, patch.tile)]
    at = (patch.row, patch.column)
    return all(0 <= box[a] + at[a] * box[a + 2] / grid.iloc[a] < size[a] for a in (0, 1))
