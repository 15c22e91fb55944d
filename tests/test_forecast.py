"""What `plan` says before weights are loaded, against what a run does."""

import dataclasses
import inspect
import json
import math
import re
import time

import families
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import geofast as gf
from geofast.cli import main
from geofast.data import from_arrays
from geofast.extract import Example
from geofast.forecast import _beside, _memory_of_solving
from geofast.models.inputs import text_collate
from geofast.models.skeleton import has_skeleton, skeleton, weight_bytes
from geofast.plan import make_plan
from geofast.pooling import parse_pools
from geofast.request import Request
from geofast.ridge.memory import (
    at_once,
    bytes_of_rows,
    bytes_of_statistics,
    bytes_of_wide_rows,
    bytes_on_cpu,
)
from geofast.speed import solve_rate, solve_work
from geofast.survey import Survey, estimate, survey, token_count

# PaliGemma's processor hands numpy what it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
# Those whose images are cut into tiles lay out new lines of tokens that the estimate leaves out.
ESTIMATED = {
    "siglip2", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3",
    "smolvlm", "pixtral", "mistral3", "phi4_multimodal",
}  # fmt: skip
ALL = (
    *families.VISION_FAMILIES, *families.COMPARING_FAMILIES, *families.TALKING_FAMILIES,
    *families.LANGUAGE_FAMILIES,
)  # fmt: skip

OPTIONS = {
    "sites": None, "pool": "last", "prompts": None, "split": gf.KFold(5), "group": None,
    "alphas": gf.ALPHAS, "select": None, "targets": ("latitude", "longitude"), "baselines": None,
    "controls": (), "batch_size": None, "workers": None, "strict": False,
}  # fmt: skip


def name_of(family):
    return family.__name__


def save(family, folder):
    if needed := families.NEEDS.get(family.__name__):
        pytest.importorskip(needed, reason=f"transformers' processor needs {needed}")
    return families.save(family, folder)


def without_weights(folder):
    for path in folder.glob("*.safetensors"):
        path.unlink()
    return folder


def photos(n=30, size=(40, 56)):
    r = np.random.default_rng(0)
    images = [r.integers(0, 255, (*size, 3), dtype=np.uint8) for _ in range(n)]
    return from_arrays(images, r.uniform(-60, 60, n), r.uniform(-90, 90, n))


def words(n=30):
    r = np.random.default_rng(0)
    texts = [" ".join(["w5"] * (1 + i % 9)) for i in range(n)]
    return from_arrays(texts, r.uniform(-60, 60, n), r.uniform(-90, 90, n))


def batch_of(model):
    kind = words(10) if model.kind == "text" else photos(1)
    sample = kind.load(len(kind) - 2) if model.kind == "text" else kind.load(0)
    return model.collate([model.transform(sample) if model.transform else sample])


def surveyed(model):
    model = model.asking(["w1 w2", "w3"]) if model.prompts else model
    wanted = model.sites()
    return survey(model.until(wanted), wanted, batch_of(model))


@pytest.mark.parametrize("family", ALL, ids=name_of)
def test_a_model_without_weights_shows_what_the_model_does(tmp_path, family):
    real = gf.load(save(family, tmp_path))
    bare = skeleton(without_weights(tmp_path))
    assert all(p.is_meta for p in bare.module.parameters())
    assert weight_bytes(bare.module) == weight_bytes(real.module)
    mine, theirs = surveyed(bare), surveyed(real)
    assert ("estimated" in mine.how) == (family.__name__ in ESTIMATED)
    assert mine.shapes.keys() == theirs.shapes.keys()
    for site, shape in theirs.shapes.items():
        if site not in ("projector", "vision.joint"):
            assert mine.shapes[site] == shape, site
    assert token_count(mine.shapes) == token_count(theirs.shapes)
    # The fused attention of the CPU is not counted, that without numbers is.
    flops = theirs.flops
    if family is families.phi4_multimodal:  # of so many patches, attention is most of the work
        real.module.set_attn_implementation("eager")
        flops = surveyed(real).flops
    assert 0.8 < mine.flops / flops < 1.7
    assert 0.3 < mine.peak / theirs.peak < 1.5


@pytest.mark.parametrize("family", [families.llama, families.vit, families.llava], ids=name_of)
def test_an_estimate_is_near_a_run(tmp_path, family):
    model = gf.load(save(family, tmp_path))
    wanted = model.sites()
    for deepest in (wanted, wanted[:2]):
        short = model.until(deepest)
        run = survey(short, deepest, batch_of(model))
        guess = estimate(short, deepest, batch_of(model), "")
        assert guess.shapes == run.shapes
        # Embeddings are not in it: patches are cut by a product.
        assert 0.6 < guess.flops / run.flops < 1.5
        assert 0.3 < guess.peak / run.peak < 2


def test_activations_are_those_that_are_alive_at_once():
    """Three layers of a plain stack: a layer's input, and what it makes of it."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = torch.nn.LayerNorm(64), torch.nn.Linear(64, 64, bias=False)

        def forward(self, hidden):
            return self.linear(hidden)

    class Stack(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([Block(), Block(), Block()])

        def forward(self, pixel_values):
            for layer in self.layers:
                pixel_values = layer(pixel_values)
            return pixel_values

    model = gf.load(Stack(), prepare=lambda inputs: {"pixel_values": torch.stack(inputs)})
    wanted = model.sites()
    seen = survey(model.until(wanted), wanted, model.collate([torch.zeros(10, 64)]))
    assert seen.peak == 2 * 10 * 64 * 4
    assert seen.flops == 3 * 2 * 10 * 64 * 64
    assert seen.shapes["vision.layers.2"] == (10, 64)


def test_weights_are_counted_by_dtype(tmp_path):
    save(families.llama, tmp_path)
    model = skeleton(tmp_path, dtype=torch.bfloat16)
    plain = weight_bytes(model.module)
    whole = sum(p.numel() for p in model.module.parameters())
    assert plain[torch.bfloat16] == 2 * whole
    matrices = sum(
        m.weight.numel() for m in model.body.layers.modules() if isinstance(m, torch.nn.Linear)
    )
    for how, bits in (({"load_in_4bit": True}, 4), ({"bits": 8, "quant_method": "gptq"}, 8)):
        model.module.config.quantization_config = how
        packed = weight_bytes(model.module)
        assert packed[torch.int8] == matrices * bits // 8
        assert packed[torch.bfloat16] == 2 * (whole - matrices)


@pytest.mark.parametrize(
    ("family", "data", "options"),
    [
        (families.swin, photos(), {"pool": ["mean", "max"]}),
        (families.clip, words(), {"prompts": ["{text}", "w1 {text}"]}),
        (families.qwen2_5_vl, photos(), {"prompts": ["w1", "w2 w3"], "storage": "gram"}),
        (families.gemma2, words(), {"sites": "lm.layers.1", "storage": "gram"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_plan_is_what_a_probe_does(tmp_path, family, data, options):
    folder = save(family, tmp_path)
    options = {"split": gf.KFold(3), **options}
    run = gf.probe(folder, data, workers=0, **options)
    told = gf.plan(without_weights(folder), data, **options)
    assert not told.loaded
    assert (told.samples, told.device) == (30, "cpu")
    real = run.layers[run.layers["prompt"] == run.layers["prompt"].iloc[-1]]
    assert set(real["site"]) <= set(told.sites)
    widths = {site: width for site, (_, width) in told.sites.items()}
    assert all(
        widths[site] == d for site, d in zip(run.layers["site"], run.layers["d"], strict=True)
    )
    assert told.batch <= run.info["batch"]["samples"]
    assert told.tokens == run.info["batch"]["tokens"]
    assert told.batches in f"{told}"
    kept = run.rows or {k: g.matrix for k, g in run.grams.items()}
    assert told.storage.size == sum(x.nbytes for x in kept.values())
    assert told.storage.kind == run.info["arguments"]["storage"]


def test_what_is_printed(tmp_path):
    told = gf.plan(without_weights(save(families.llava, tmp_path)), photos(), prompts=["w1", "w2"])
    text = str(told)
    assert "30 samples, 2 prompt(s); batches of 30 samples, at most 1,024 tokens" in text
    assert "vision.embed to vision.layers.2 (4)" in text
    assert "17 x 32   cls" in text
    assert "weights      under 1 MB of float32" in text
    assert "activations" in text
    assert f"{told.share:.1%} of all" in text
    assert 0 < told.share < 1
    assert told.probing == 0  # which is of a GPU
    assert "probing      under 1 MB" not in text
    assert "solving      under 1 MB a layer, at most, on the CPU, one after the other" in text


def of_gpu(monkeypatch, free, storage="rows", width=1024, samples=2000):
    """Return what is said of probing a text model's 24 sites on a GPU, from rows that stay."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 0))
    module = tiny.llama()
    model = gf.load(module, prepare=text_collate(tiny.tokenizer(), module.base_model))
    asked = Request.of(words(samples), {**OPTIONS, "storage": storage}, location=False)
    seen = Survey({f"lm.layers.{i}": (10, width) for i in range(24)}, 0.0, 0, "")
    example = Example((width,) * 24, 10, 0)
    kept = make_plan(
        model, asked.inputs, example.widths, targets=2, cells=5, storage=storage, select=None,
        passes=1, waiting=2048 + 64, gpus=["cuda:0"],
    )  # fmt: skip
    assert kept.stay
    pools = {"lm": parse_pools("last")}
    beside = _beside(model, asked, kept, 64, 2048 + 64, seen, example, pools)
    return kept, beside, _memory_of_solving(asked, kept, example.widths, "cuda:0", 0)


@pytest.mark.parametrize("storage", ["rows", "gram"])
def test_memory_of_a_gpu(monkeypatch, storage):
    kept, probing, solving = of_gpu(monkeypatch, 20 << 30, storage)
    state = 64 * 10 * 1024 * 4
    added = 8 * (2048 + 64) * 4 if storage == "gram" else 0
    assert probing == state + 64 * 10 + 2 * 4 * 64 * 24 * 1024 + 16 * 25 * (2048 + 64) + added
    shape = 2, 5, len(gf.ALPHAS)
    each = bytes_of_rows(2000, 1024, 4, *shape, "loo")
    if storage == "gram":
        each = bytes_of_statistics(1024, *shape, "gcv")
    assert (solving.device, solving.layer) == ("cuda:0", each)
    assert solving.at_once == at_once(24, (20 << 30) - kept.size, each) == 24
    assert (
        f"a layer, at most, on the GPU, 24 at once: {solving.size / 2**30:.1f} GB" in f"{solving}"
    )
    few = of_gpu(monkeypatch, kept.size + (4 << 30), storage)[-1]
    assert few.at_once < 24
    assert few.size < 0.7 * (4 << 30)


def test_where_a_gpu_leaves_solving_to_the_cpu(monkeypatch):
    """What has few features; with fewer rows than features, X X' is what is solved."""
    solving = of_gpu(monkeypatch, 20 << 30, width=200)[-1]
    assert (solving.device, solving.at_once) == ("cpu", 1)
    assert solving.layer == bytes_on_cpu(2000, 200, 2, 5, len(gf.ALPHAS), "loo", rows=True)
    wide = of_gpu(monkeypatch, 20 << 30, samples=1000)[-1]
    assert wide.layer == bytes_of_wide_rows(1000, 1024, 4, 2, 5, len(gf.ALPHAS))


def test_what_is_printed_of_a_gpu_fits_100_columns(tmp_path, monkeypatch):
    told = gf.plan(save(families.vit, tmp_path), photos())
    kept, probing, solving = of_gpu(monkeypatch, 20 << 30)
    kept = dataclasses.replace(kept, pinned=300 << 30)
    told = dataclasses.replace(told, storage=kept, probing=probing, solving=solving)
    lines = str(told).splitlines()
    assert max(map(len, lines)) <= 100
    memory = "\n".join(lines)
    assert re.search(r"rows +188 MB on the GPU", memory)
    assert re.search(
        r"probing +15 MB on the GPU beside the model, at most; 300.0 GB of pinned", memory
    )
    assert re.search(r"solving +\d+ MB a layer, at most, on the GPU, 24 at once: [\d.]+ GB", memory)


def test_what_is_printed_fits_100_columns(tmp_path):
    """Qwen's plan says why it was estimated; the names of branches are the longest."""
    sites = ["vision.layers.*.attn", "vision.layers.*", "lm.layers.*.attn"]
    told = gf.plan(save(families.qwen2_5_vl, tmp_path), photos(), sites=sites, prompts="w1")
    assert "does not run without weights" in " ".join(str(told).split())
    many = {f"vision.layers.{i}.attn": shape for i, shape in enumerate([(16, 32)] * 32)}
    lines = str(dataclasses.replace(told, sites={**many, "lm.embed": (9, 32)})).splitlines()
    assert max(map(len, lines)) <= 100
    cells = [cell for line in lines if (cell := re.search(" x (width|32)", line))]
    assert [cell.end() for cell in cells] == [68] * 3
    assert "!." not in str(told)


def test_a_model_that_is_there_is_planned_from_as_it_is():
    module = tiny.llama()
    model = gf.load(module, prepare=text_collate(tiny.tokenizer(), module.base_model))
    assert not has_skeleton(model)
    assert not has_skeleton("open_clip:ViT-B-32/openai")
    assert has_skeleton("facebook/dinov2-small")
    told = gf.plan(model, words(), split=gf.KFold(3))
    assert told.loaded
    assert "planned from the loaded model" in str(told)
    other = gf.plan(model, words(), split=gf.KFold(3), prompts="w1 {text} w2")
    assert other.sites["lm.layers.2"] == (11, 32)
    assert told.sites["lm.layers.2"] == (9, 32)


def test_a_class_that_needs_numbers_is_told(tmp_path, monkeypatch):
    import transformers

    def numbers(*_, **__):
        raise RuntimeError("Tensor.item() cannot be called on meta tensors")

    folder = save(families.vit, tmp_path / "vit")
    monkeypatch.setattr(transformers.AutoModel, "from_config", numbers)
    with pytest.raises(RuntimeError, match=r"vit cannot be built without its weights \(Tensor"):
        gf.plan(folder, photos())


@pytest.mark.alone
def test_planning_takes_no_longer_than_what_it_plans(tmp_path):
    """Fifty folds have 1,225 pairs; measured as they are, they took minutes."""
    folder = save(families.vit, tmp_path)
    r = np.random.default_rng(0)
    images = [np.full((8, 8, 3), i % 251, np.uint8) for i in range(2000)]
    data = from_arrays(images, r.uniform(-60, 60, 2000), r.uniform(-90, 90, 2000))
    gf.plan(folder, data, split=gf.KFold(5))
    start = time.perf_counter()
    many = gf.plan(folder, data, split=[gf.KFold(50), *(gf.Blocks(20 + i) for i in range(8))])
    assert time.perf_counter() - start < 20
    assert many.seconds["solve"] > gf.plan(folder, data, split=gf.KFold(5)).seconds["solve"]


def assert_near(seconds, *stages):
    """Hold what is told to what it took: within a factor of four, least against least.

    A shared machine stands still for seconds now and then, and what was timed then says nothing:
    both are timed again, up to eight times. The least only comes nearer to an idle machine's.
    """
    told, took = dict.fromkeys(stages, math.inf), dict.fromkeys(stages, math.inf)
    for _ in range(8):
        for least, now in zip((told, took), seconds(), strict=True):
            least.update({stage: min(least[stage], now[stage]) for stage in stages})
        if all(0.25 < told[stage] / took[stage] < 4 for stage in stages):
            return
    raise AssertionError(f"told {told}, took {took}")


@pytest.mark.alone
@pytest.mark.parametrize(("samples", "width", "select"), [(800, 96, "loo"), (4000, 256, "gcv")])
def test_solving_is_told_from_a_smaller_size(samples, width, select):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, width, generator=generator)
    y = (x[:, :2] + torch.randn(samples, 2, generator=generator)).double()
    fold = torch.arange(samples) % 5

    def seconds() -> tuple[dict[str, float], dict[str, float]]:
        rate = solve_rate(samples, width, 2, 5, gf.ALPHAS, select)
        start = time.perf_counter()
        gf.cross_validate(x, y, fold, select=select, inner=True)
        took = time.perf_counter() - start
        return {"solve": solve_work(samples, width, 5) / rate}, {"solve": took}

    assert_near(seconds, "solve")


def test_little_is_not_told_in_many_digits(tmp_path):
    text = str(gf.plan(save(families.vit, tmp_path), photos(), split=gf.KFold(2)))
    assert re.search(r"forward +(under 0\.1|about \d+(\.\d+)?) s \(under 0\.01 GFLOP a", text)
    assert re.search(r"activations +under 1 MB", text)
    assert re.search(r"rows +under 1 MB in memory", text)
    assert not re.search(r"e-\d\d|[^.,\d]0(\.0+)? (s|MB|GFLOP)", text)


def test_a_budget_and_a_cap_are_told(tmp_path):
    folder = save(families.vit, tmp_path)
    assert gf.plan(folder, photos(), batch_size=4).batch == 4
    assert gf.plan(folder, photos()).batch == 30


def test_a_twin_is_counted(tmp_path):
    folder = save(families.vit, tmp_path)
    alone = gf.plan(folder, photos())
    both = gf.plan(folder, photos(), controls="random-weights")
    assert both.flops == 2 * alone.flops
    assert both.weights == {"float32": 2 * alone.weights["float32"]}
    assert both.storage.size == 2 * alone.storage.size
    assert str(both).count("half of it the twin's") == 2
    assert "the twin's" not in str(alone)


@pytest.mark.parametrize("job", [gf.plan, gf.probe])
@pytest.mark.parametrize("way", ["quantised", "adapted", "an adapter itself"])
def test_without_a_twin_no_weight_is_read(tmp_path, monkeypatch, job, way):
    """There is none to read: whatever comes later than the refusal raises another error."""
    folder, adapter = without_weights(save(families.llama, tmp_path / "lm")), tmp_path / "tuned"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(folder), "peft_type": "LORA"})
    )
    options, said = {}, r"^lm \+ tuned has no twin of random weights: an adapter is on; merge it"
    if way == "adapted":
        options = {"adapter": adapter}
    elif way == "an adapter itself":
        folder = adapter
    else:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
        (folder / "config.json").write_text(json.dumps(config))
        said = "^lm has no twin of random weights: its weights are quantised"
    with pytest.raises(ValueError, match=said):
        job(folder, words(), controls="random-weights", **options)


def test_a_merged_adapter_leaves_a_twin(tmp_path):
    folder, adapter = without_weights(save(families.llama, tmp_path / "lm")), tmp_path / "tuned"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(folder), "peft_type": "LORA"})
    )
    options = {"adapter": adapter, "merge": True, "controls": "random-weights"}
    told = gf.plan(folder, words(), **options)
    assert (told.model, told.twin) == ("lm + tuned (merged)", True)


@pytest.mark.parametrize("job", [gf.plan, gf.probe])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"merge": True}, r"merge=True \(--merge-adapter\) goes with an adapter"),
        ({"device": "cpu", "device_map": "auto"}, "give device= or device_map=, not both"),
        ({"device_map": "everywhere"}, "'auto' or a mapping from parts to devices; got 'everyw"),
    ],
)
def test_a_plan_refuses_what_a_probe_refuses(tmp_path, job, options, said):
    folder = without_weights(save(families.llama, tmp_path / "lm"))
    with pytest.raises(ValueError, match=said):
        job(folder, words(), **options)


@pytest.mark.parametrize("job", [gf.plan, gf.probe])
def test_a_model_that_is_there_takes_nothing_that_loads_one(job):
    module = tiny.llama()
    model = gf.load(module, prepare=text_collate(tiny.tokenizer(), module.base_model))
    with pytest.raises(ValueError, match="is loaded already: leave adapter and merge out"):
        job(model, words(), adapter="some/adapter", merge=True)
    with pytest.raises(ValueError, match="is loaded already: leave device_map and trust_remote_co"):
        job(model, words(), device_map="auto", trust_remote_code=True)
    with pytest.raises(ValueError, match="adapter goes with a checkpoint of transformers"):
        job("timm:vit_tiny_patch16_224", photos(), adapter="some/adapter")


def test_plan_and_probe_take_the_same():
    plan, probe = (inspect.signature(job).parameters for job in (gf.plan, gf.probe))
    assert plan == probe


@pytest.mark.alone
def test_the_prediction_is_near_a_run(tmp_path):
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=192, num_hidden_layers=6, num_attention_heads=3)
    Dinov2Model(config).save_pretrained(tmp_path)
    side = {"height": 224, "width": 224}
    BitImageProcessorPil(size={"shortest_edge": 224}, crop_size=side).save_pretrained(tmp_path)
    data = photos(60, (224, 224))
    options = dict(split=gf.KFold(5), pool=["cls", "mean:patch"])
    gf.probe(tmp_path, data.take(range(10)), check=False, workers=0, **options)

    def seconds() -> tuple[dict[str, float], dict[str, float]]:
        run = gf.probe(tmp_path, data, check=False, workers=0, **options)
        return gf.plan(tmp_path, data, **options).seconds, run.info["seconds"]

    assert_near(seconds, "forward", "solve")


def test_the_command(tmp_path, capsys):
    for i in range(12):
        Image.fromarray(np.full((40, 40, 3), 20 * i, np.uint8)).save(tmp_path / f"{i}.png")
    rows = [f"{i}.png,{5 * i + 1},{7 * i + i % 5}" for i in range(12)]
    table = tmp_path / "photos.csv"
    table.write_text("\n".join(["image,latitude,longitude", *rows, "gone.png,3,4"]))
    model = without_weights(save(families.vit, tmp_path / "model"))
    options = ["--folds", "2", "--pool", "mean:patch", "--batch-size", "3", "--unchecked"]
    assert main(["plan", str(model), str(table), *options]) == 0
    out, told = capsys.readouterr()
    assert told.endswith("measuring how fast this machine is ...\n")
    assert "12 samples (1 more cannot be used), 1 prompt(s); batches of 3 samples" in out
    assert "vision.embed to vision.layers.2 (4)" in out
    assert main(["plan", str(model), str(table), "--sites", "lm.*"]) == 1
    assert "no site matches 'lm.*'" in capsys.readouterr().err


def test_a_batch_fits_the_towers_that_nobody_reads(tmp_path):
    """A vision tower has four times the patches that its language model is handed."""
    where, told = save(families.qwen2_5_vl, tmp_path), {}
    for sites in (None, "lm.*"):
        told[sites] = gf.plan(where, photos(), sites=sites, prompts="w1")
        run = gf.probe(where, photos(), sites=sites, prompts="w1", split=gf.KFold(2), check=False)
        assert told[sites].batch == run.info["batch"]["samples"]
    assert told["lm.*"].batch == told[None].batch == 1024 // 140
    assert all(name.startswith("lm.") for name in told["lm.*"].sites)
