"""What tokens are, and where in the image they come from: by experiment, family by family."""

import itertools
from contextlib import ExitStack
from dataclasses import replace

import families
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import ExifTags, Image
from torch import nn

import geofast as gf
from geofast import _reference
from geofast.models import describe, places
from geofast.pooling import Pool, role_bit
from geofast.tokens import explain

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


def boxes_of(model, family, size):
    """Where every tile lies in an image of `size`: top, left, height, width in its pixels."""
    height, width = size
    whole, name = (0, 0, height, width), family.__name__
    processor = getattr(model.transform, "processor", None)
    processor = getattr(processor, "image_processor", processor)
    if name == "sam":
        return [(0, 0, max(size), max(size))]  # padded at the right and at the bottom
    if name == "phi4_multimodal":
        return [whole, *cut(size, 32)]
    if name in ("llava_next", "llava_onevision"):
        tiles = [(0, -16, 32, 32), (0, 16, 32, 32)] if size == (32, 32) else cut(size, 32)
        return [whole, *tiles]  # a small image is padded at the left and at the right
    if name == "internvl":
        return [*cut(size, 32), whole] if max(size) > 32 else [whole]
    if name in ("idefics3", "smolvlm"):
        return [*cut(size, max(size) // 2), whole]
    if (
        getattr(processor, "do_center_crop", False)
        and processor.size.shortest_edge
        and width > height
    ):
        return [(0, (width - height) // 2, height, height)]
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
            plan = [
                (boxes[sample][tile], cells, axis, bit) for bit in range((cells - 1).bit_length())
            ]
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
    if family is families.phi4_multimodal:  # of 32 x 32 pixels, each a patch
        sizes = ((64, 32), (32, 64))
    if family is families.dinov3_convnext:  # before its first stage every pixel is a token
        wanted, sizes = wanted[1:], [(2 * h, 2 * w) for h, w in SIZES]
    check_places(model, sizes, [boxes_of(model, family, size) for size in sizes], wanted)


def reaches(patch, boxes, sizes, grids):
    """Whether a patch lies in the image, and not in what pads it."""
    box, size = boxes[patch.sample][patch.tile], sizes[patch.sample]
    grid = grids.loc[(patch.sample, patch.site, patch.tile)]
    at = (patch.row, patch.column)
    return all(0 <= box[a] + at[a] * box[a + 2] / grid.iloc[a] < size[a] for a in (0, 1))


@pytest.mark.parametrize(
    "family", [f for f in families.ZOO_FAMILIES if "resnet" not in f.__name__], ids=name_of
)
def test_places_in_models_of_open_clip_and_timm(load, family):
    """In two images of one size: their own transforms crop every image to a square.

    Every convolution of a ResNet looks beyond its patch; the experiment can switch none off.
    """
    model = load(family)
    side = {"open_clip_siglip": 160, "timm_convnext": 64}.get(family.__name__, 32)

    def pixels(image):
        return torch.tensor(np.array(image)).float().movedim(2, 0) / 255 - 0.5

    model = replace(model, transform=pixels)
    layers = [s.name for s in model.sites("vision.layers.*")]
    sizes = ((side, side),) * 2
    check_places(model, sizes, [[(0, 0, *size)] for size in sizes], ["vision.embed", *layers[-2:]])


def test_the_experiment_can_tell_windows(load, monkeypatch):
    """The opposite: as if Qwen2.5-VL did not sort its tokens by window."""
    model = load(families.qwen2_5_vl).asking(["w1"])
    sizes = SIZES[1:2]
    check_places(model, sizes, [[(0, 0, *sizes[0])]], ["vision.layers.1", "projector"])
    monkeypatch.setattr(places, "_window", lambda *_: None)
    for site in ("vision.layers.1", "projector"):
        with pytest.raises(AssertionError, match="values are different"):
            check_places(model, sizes, [[(0, 0, *sizes[0])]], [site])


def test_windows_are_those_of_transformers():
    from transformers.vision_utils import get_vision_window_index

    r = np.random.default_rng(0)
    for _ in range(20):
        rows, columns, merge, window = (
            *(2 * r.integers(1, 12, 2)).tolist(),
            2,
            int(r.integers(1, 5)),
        )
        grid = torch.tensor([[1, rows, columns]])
        index, _ = get_vision_window_index(grid, merge, window * merge * 4, 4)
        theirs = places._order(rows, columns, merge, None).view(-1, merge**2, 2)[index]
        assert torch.equal(places._order(rows, columns, merge, window), theirs.flatten(0, 1))


def test_images_that_onevision_shrinks(load):
    """Then a token blends patches; its place is the patch where its centre lies."""
    model = load(families.llava_onevision)
    config = model.module.config
    assert config.vision_aspect_ratio == "anyres_max_9"
    config.vision_aspect_ratio = "anyres_max_2"
    try:
        (packs,) = [m for m in model.module.modules() if type(m).__name__ == "LlavaOnevisionModel"]
        tokens = places._joined(packs, [(4, 4)] * 5, [64, 64])
    finally:
        config.vision_aspect_ratio = "anyres_max_9"
    assert tokens[:16].tolist() == [[0, r, c] for r in range(4) for c in range(4)]
    # 8 x 8 patches become 5 x 5, whose centres lie in patches 0, 2, 4 (or 3), 5 and 7.
    joined = tokens[16:].view(5, 6, 3)
    assert (joined[:, 5] == -1).all()
    across = (joined[0, :5, 0] - 1) * 4 + joined[0, :5, 2]
    assert across.tolist() in ([0, 2, 3, 5, 7], [0, 2, 4, 5, 7])
    down = (joined[:, 0, 0] - 1) // 2 * 4 + joined[:, 0, 1]
    assert down.tolist() == across.tolist()


def test_patches_of_a_masked_autoencoder_go_by_its_noise(load):
    """As it is loaded they are in order; where somebody shuffles them, places follow."""
    model = load(families.vit_mae)
    shuffled = torch.rand(1, 16, generator=torch.manual_seed(3))
    (site,) = model.sites("vision.embed")
    batch = model.prepare([photo((32, 32))])
    seen = []
    watch = site.watch(seen.append)
    model.forward(batch)
    model.forward(batch | {"noise": shuffled})
    watch.remove()
    plain, mixed = (x[0, 1:] for x in seen)
    from geofast.models.layout import Call, lay_out

    (tower,) = model.towers
    call = Call(batch | {"noise": shuffled})
    layout = lay_out(site, tower, seen[1], call)
    found = places.patch_places([model.body], tower, seen[1].shape, call, layout)
    assert found[0].tolist() == [-1, -1, -1]
    torch.testing.assert_close(mixed, plain[found[1:, 1] * 4 + found[1:, 2]])
    unsaid = Call({"pixel_values": batch["pixel_values"]})
    nowhere = places.patch_places([model.body], tower, seen[1].shape, unsaid, layout)
    assert (nowhere == -1).all()


# ------ what tokens are


PREFIXES = {
    "vit": ["cls"], "deit": ["cls", "register"], "dinov2_registers": ["cls"] + ["register"] * 4,
    "siglip2": [], "swin": [], "llava_next": ["cls"], "qwen2_5_vl": [], "gemma3": [],
    "internvl": ["cls"], "idefics3": [], "paligemma": [], "clip": ["cls"],
    "phi4_multimodal": [],
}  # fmt: skip
MARKS = {
    "<|vision_start|>", "<|vision_end|>", "<start_of_image>", "<end_of_image>", "<img>", "</img>",
    "<fake_token_around_image>", "<global-img>",
}  # fmt: skip
IMAGE_WORDS = {"<image>", "<|image_pad|>", "<image_soft_token>", "<IMG_CONTEXT>"}


def roles_by_hand(model, prefix, batch, site, hidden):
    """A list of tokens a sample: index into the hidden states laid end to end, and role."""
    tower = site.split(".")[0]
    if tower in ("lm", "text"):
        given = batch["prompts"][0] if "prompts" in batch else batch
        ids = given["input_ids"]
        mask = given.get("attention_mask", given.get("real"))
        tokenizer = getattr(model.collate, "tokenizer", None) or model.transform.processor.tokenizer
        samples = []
        for i, row in enumerate(ids.tolist()):
            words = tokenizer.convert_ids_to_tokens(row)
            roles = [
                "image" if w in IMAGE_WORDS and tower == "lm" else "all" if w in MARKS else "text"
                for w in words
            ]
            numbered = [(i * len(row) + t, r) for t, r in enumerate(roles)]
            samples.append([x for x, real in zip(numbered, mask[i].tolist(), strict=True) if real])
        return samples
    image = batch.get("image", batch)
    if (grid := image.get("image_grid_thw")) is not None:
        sequences = grid.prod(1).tolist()
    else:
        tiles = image.get("tiles", torch.ones(len(image["pixel_values"]), dtype=torch.int64))
        length = hidden.shape[1:-1].numel()
        sequences = [length] * int(tiles.sum())
    per_sample = image["tiles"].tolist() if "tiles" in image and grid is None else None
    ends = np.cumsum([0, *sequences])
    mask = image.get("pixel_attention_mask")
    if (padded := image.get("image_attention_mask")) is not None:
        crops = zip(padded, image["tiles"], strict=True)
        mask = torch.cat([one[:n] for one, n in crops]).flatten(1)
        assert not mask.all()
    tokens = []
    for i, (a, b) in enumerate(itertools.pairwise(ends)):
        roles = [*prefix, *["patch"] * (b - a - len(prefix))]
        real = mask[i].tolist() if mask is not None and mask.ndim == 2 else [1] * (b - a)
        tokens.append([(a + t, r) for t, r in enumerate(roles) if real[t]])
    if per_sample is None:
        return tokens
    whole = np.cumsum([0, *per_sample])
    return [list(itertools.chain(*tokens[a:b])) for a, b in itertools.pairwise(whole)]


def expected_rows(hidden, samples, pool):
    """Pool by the reference in float64, one sample at a time."""
    flat = hidden.reshape(-1, hidden.shape[-1]).double()
    rows = []
    for tokens in samples:
        x = flat[[t for t, _ in tokens]][None]
        bits = [1 | (1 << role_bit(role)) for _, role in tokens]
        roles = torch.tensor([bits], dtype=torch.uint8)
        out = torch.empty(1, 0, dtype=torch.float64)
        for operation, role in Pool.parse(pool).parts:
            part = torch.empty(1, x.shape[-1], dtype=torch.float64)
            _reference.pool(x, roles, [(operation, role_bit(role), part)])
            out = torch.cat([out, part], 1)
        rows.append(out)
    return torch.cat(rows)


OVER = ["last", "mean", "max", "min"]
ROLE_POOLS = {
    "cls": ["cls", "mean:cls"], "register": ["mean:register", "max:register"],
    "patch": ["mean:patch", "max:patch", "min:patch", "max:patch+min:patch"],
    "image": ["mean:image", "max:image", "min:image", "mean:image+last"],
    "text": ["mean:text", "max:text", "min:text", "mean:text+max"],
}  # fmt: skip


def check_pools(model, prefix, inputs, pattern):
    batch = model.prepare(inputs)
    sites = model.sites(pattern)
    for site in sites:
        seen = []
        watch = site.watch(lambda hidden, seen=seen: seen.append(hidden.clone()))
        model.until([site]).forward(batch)
        watch.remove()
        samples = roles_by_hand(model, prefix, batch, site.name, seen[0])
        assert len(samples) == len(inputs)
        there = {role for tokens in samples for _, role in tokens}
        pools = OVER + [p for role, names in ROLE_POOLS.items() if role in there for p in names]
        with gf.capture(model, site.name, pools) as rows:
            model.until([site]).forward(batch)
        assert len(rows) == len(pools)
        for pool in pools:
            got, expected = (
                rows[f"{site.name}/{pool}"].double(),
                expected_rows(seen[0], samples, pool),
            )
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PREFIXES)
def test_every_pool_is_of_its_tokens(load, name):
    """For mixed image sizes in one batch, and for prompts of different lengths."""
    model = load(getattr(families, name))
    model = model.asking(["w1 w2 w3"]) if model.prompts else model
    inputs = [photo(size) for size in SIZES]
    if name == "phi4_multimodal":  # which pads a crop at the right and below
        inputs = [photo(size) for size in ((32, 32), (32, 50), (20, 32))]
    check_pools(model, PREFIXES[name], inputs, ["vision.embed", "vision.layers.1"])
    if model.prompts:
        check_pools(model, [], inputs, ["lm.embed", "lm.layers.1"])
    if model.other:
        texts = ["w1 w2 w3 w4", "w5", "w6 w7"]
        check_pools(model.reading("text"), [], texts, ["*.embed", "*.layers.1"])


@pytest.mark.parametrize(
    "family", [families.llava, families.gemma3, families.idefics3], ids=name_of
)
def test_padding_on_the_left_changes_no_role(load, family):
    """At the embedding, which knows no position, rows are the same."""
    model = load(family).asking(["w1 w2"])
    inputs = [photo(size) for size in SIZES]
    batch = model.prepare(inputs)
    texts = batch["prompts"][0]
    texts["input_ids"][0, -1] = 30  # not all prompts end alike
    if texts["attention_mask"].all():
        texts["attention_mask"][1, -1] = 0
    order = texts["attention_mask"].argsort(dim=1, stable=True)
    assert not torch.equal(order, torch.arange(order.shape[1]).expand_as(order))
    moved = {k: v.gather(1, order) for k, v in texts.items()}
    pools = ["last", "mean:text", "mean:image", "max"]
    rows = []
    for given in (texts, moved):
        with gf.capture(model, "lm.embed", pools) as one:
            model.forward({**batch, "prompts": [given]})
        rows.append({key: one[key] for key in one})
    torch.testing.assert_close(rows[0], rows[1])
    last = rows[0]["lm.embed/last"]
    assert not torch.allclose(last[0], last[1])


@pytest.mark.parametrize(
    ("family", "site", "pool", "said"),
    [
        (families.vit, "vision.embed", "mean:register", "no register token; here are cls, patch"),
        (families.swin, "vision.layers.0", "cls", "no cls token; here are patch tokens"),
        (families.llama, "lm.embed", "max:patch", "no patch token; here are text tokens"),
        (families.llava, "lm.embed", "cls", "no cls token; here are image, text tokens"),
        (families.llava, "vision.layers.1", "mean:text", "no text token; here are cls, patch"),
    ],
)
def test_a_pool_without_its_tokens_says_what_there_is(load, family, site, pool, said):
    model = load(family)
    inputs = ["w1 w2"] if model.kind == "text" else [photo((32, 32))]
    with gf.capture(model, site, pool), pytest.raises(ValueError, match=said):
        model.forward(model.prepare(inputs))


def test_padding_that_siglip_reads_is_no_text(load):
    """It was trained with texts padded to the whole context, and its joint embedding needs that."""
    model = load(families.siglip).reading("text")
    table = gf.tokens(model, ["w1 w2 w3", "w4"])
    assert table.groupby(["sample", "role"]).size().to_dict() == {
        (0, "padding"): 61, (0, "text"): 3, (1, "padding"): 63, (1, "text"): 1,
    }  # fmt: skip
    assert table[table["last"]]["text"].tolist() == ["w3", "w4"]
    with gf.capture(model, "text.embed", ["mean:text", "last"]) as rows:
        model.forward(model.prepare(["w4", "w1 w2 w3"]))
    torch.testing.assert_close(rows["text.embed/mean:text"][0], rows["text.embed/last"][0])
    assert not torch.allclose(rows["text.embed/mean:text"][1], rows["text.embed/last"][1])


def test_of_embeddings_alone_nobody_can_tell_text_from_image(load):
    body = load(families.llava).body
    ids = torch.tensor([[4, 4, 30, 31]])
    embeddings = body.get_input_embeddings()(ids).detach()
    with gf.capture(body, "lm.layers.0", ["last", "mean"]) as rows, torch.no_grad():
        body(inputs_embeds=embeddings)
    assert len(rows) == 2
    message = "pool 'mean:text' at lm.layers.0: sample 0 of the batch has no text token$"
    with gf.capture(body, "lm.layers.0", "mean:text"), pytest.raises(ValueError, match=message):
        body(inputs_embeds=embeddings)


def test_the_norm_of_clip_is_that_of_its_cls_token(load):
    model = load(families.clip)
    table = gf.tokens(model, [photo((32, 32))], ["vision.layers.2", "vision.norm"])
    assert table.groupby("site")["role"].agg(list)["vision.norm"] == ["cls"]
    with gf.capture(model, ["vision.layers.2", "vision.norm"]) as rows:
        model.forward(model.prepare([photo((32, 32))]))
    norm = model.towers[0].norm
    torch.testing.assert_close(rows["vision.norm/cls"], norm(rows["vision.layers.2/cls"]).detach())


def test_the_norm_of_dinov3_convnext_sees_the_mean_of_all_patches_first(load):
    model = load(families.dinov3_convnext)
    sites = ["vision.layers.3", "vision.norm"]
    table = gf.tokens(model, [photo((64, 64))], sites)
    norm = table[table["site"] == "vision.norm"]
    assert norm["role"].tolist() == ["cls", "patch", "patch", "patch", "patch"]
    assert norm[["row", "column"]].to_numpy().tolist()[1:] == [[0, 0], [0, 1], [1, 0], [1, 1]]
    with gf.capture(model, sites, {"vision": ["mean", "mean:patch"]}) as rows:
        model.forward(model.prepare([photo((64, 64))]))
    with gf.capture(model, "vision.norm", "cls") as first:
        model.forward(model.prepare([photo((64, 64))]))
    expected = model.towers[0].norm(rows["vision.layers.3/mean"]).detach()
    torch.testing.assert_close(first["vision.norm/cls"], expected)


# ------ what is printed


def test_a_table_of_tokens(load):
    model = load(families.qwen2_5_vl).asking(["w1 w2", ""])
    table = gf.tokens(model, [photo((16, 16)), photo((32, 16))], ["vision.layers.1", "lm.embed"])
    assert table.columns.tolist() == [
        "site", "prompt", "sample", "token", "role", "last", "tile", "row", "column", "text",
    ]  # fmt: skip
    first = table[
        (table["site"] == "lm.embed") & (table["prompt"] == "w1 w2") & (table["sample"] == 0)
    ]
    roles = first["role"].tolist()
    assert roles == ["other", *["image"] * 4, "other", "text", "text", "text", *["padding"] * 4]
    assert first["text"].tolist()[6:9] == ["w1", "w2", "w9"]
    assert first["last"].to_numpy().nonzero()[0].tolist() == [8]
    assert set(table["prompt"]) == {"", "w1 w2"}
    vision = table[table["site"] == "vision.layers.1"]
    assert vision.groupby("sample").size().tolist() == [16, 32]
    assert set(vision["prompt"]) == {""}
    texts = gf.tokens(model.reading("text"), ["w1 w2 w3", "w4"])
    assert texts["role"].tolist() == ["text"] * 4 + ["padding"] * 2
    assert texts["last"].tolist() == [False, False, True, True, False, False]
    with pytest.raises(ValueError, match="no site matches"):
        gf.tokens(model, [photo((16, 16))], "vision.layers.9")


def test_a_listing(load, tmp_path):
    said = explain(load(families.dinov2_registers))
    assert said.splitlines() == [
        "example: an image of 320 x 180 pixels",
        "",
        "vision.embed: 1 cls, 4 register, 16 patch",
        "  0          cls",
        "  1-4        register",
        "  5-20       patch     rows 0-3, columns 0-3, row by row  (last)",
    ]
    photo((16, 24)).save(tmp_path / "one.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "one.png").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"broken.png: cannot be decoded: image file is truncated"):
        explain(load(families.qwen2_5_vl), str(tmp_path / "broken.png"))
    said = explain(load(families.qwen2_5_vl), str(tmp_path / "one.png"))
    assert "one.png, 24 x 16 pixels" in said
    assert "rows 0-3, columns 0-5, not row by row but 0,0 0,1 1,0 1,1 0,2 0,3 1,2 1,3" in said
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    photo((16, 24)).save(tmp_path / "turned.jpg", exif=turned)  # upright, as a probe reads it
    said = explain(load(families.qwen2_5_vl), str(tmp_path / "turned.jpg"))
    assert "turned.jpg, 16 x 24 pixels" in said
    said = explain(load(families.llava_next), "w1 w2")
    assert "asked 'w1 w2'" in said
    assert "more such lines" not in said
    assert "  24         image     no one part of the image" in said
    assert "  52-54      text      w1 w2 w9  (last)" in said
    said = explain(load(families.clip))
    assert "vision.embed: 1 cls, 16 patch" in said
    assert "text.embed: 5 text" in said
    assert "lm.embed: 2 text" in explain(load(families.llama), "w1 w2")
    assert "lm.embed: 300 text" in explain(load(families.llama), "w1 " * 300)  # no name of a file
    with pytest.raises(ValueError, match=r"there is no file absent.jpg, and vit.* reads no text"):
        explain(load(families.vit), "absent.jpg")


def test_what_looks_for_objects_is_no_part_of_the_image():
    """YOLOS has tokens after its patches that each are to find something."""
    from transformers import YolosConfig, YolosImageProcessorPil, YolosModel

    torch.manual_seed(0)
    small = families.VISION | {"image_size": [32, 48], "num_detection_tokens": 20}
    processor = YolosImageProcessorPil(size={"height": 32, "width": 48})
    model = gf.load(YolosModel(YolosConfig(**small)).eval(), processor=processor)
    assert describe(model).splitlines()[2].endswith("tokens: 1 cls, then patch, then 20 register")
    assert explain(model).splitlines()[2:] == [
        "vision.embed: 1 cls, 24 patch, 20 register",
        "  0          cls",
        "  1-24       patch     rows 0-3, columns 0-5, row by row",
        "  25-44      register  (last)",
    ]
    with gf.capture(model, "vision.norm", ["mean:patch", "mean:register"]) as rows, torch.no_grad():
        hidden = model.module(**model.prepare([photo((32, 48))])).last_hidden_state
    torch.testing.assert_close(rows["vision.norm/mean:patch"], hidden[:, 1:25].mean(1))
    torch.testing.assert_close(rows["vision.norm/mean:register"], hidden[:, 25:].mean(1))


def test_where_a_patch_is_may_not_be_known():
    """Hiera keeps its patches in an order of its own."""
    from transformers import HieraConfig, HieraModel, ViTImageProcessorPil

    config = HieraConfig(embed_dim=8, image_size=[32, 32], depths=[1] * 4, num_heads=[1] * 4)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    said = explain(gf.load(HieraModel(config).eval(), processor=processor))
    assert "  0-63       patch     of which part of the image, is not known  (last)" in said


def test_the_command_prints_tokens(load, tmp_path, capsys):
    from geofast.cli import main

    folder = families.save(families.deit, tmp_path / "deit")
    assert main(["sites", str(folder), "--example"]) == 0
    said = capsys.readouterr().out
    assert "vision.layers.2 " in said
    assert "vision.embed: 1 cls, 1 register, 16 patch" in said
    assert main(["sites", str(folder)]) == 0
    assert "1 register, 16 patch" not in capsys.readouterr().out
    assert main(["sites", str(folder), "--example", "absent.png"]) == 1
    assert "there is no file absent.png" in capsys.readouterr().err


def test_a_place_is_one_vector():
    from geofast.models import location

    encoder = location.SphericalSiren(6, 32, 2, 16)
    model = gf.load(encoder, prepare=location.places)
    table = gf.tokens(model, [(48.9, 2.3), (-33.9, 151.2)])
    assert table["role"].tolist() == ["vector", "vector"]
    assert table["sample"].tolist() == [0, 1]
