"""What the engine does around a GPU's operations, on a device that is pretended."""

from importlib import import_module
from types import SimpleNamespace

import families
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from pretend import DEVICE, Pretend

import geofast as gf
from geofast import _device, _ops, _reference
from geofast.accumulate import Statistics
from geofast.batching import Budget, Lengths
from geofast.capture import NonFiniteError, NoTokenError
from geofast.data import from_arrays
from geofast.extract import Storage, extract, try_one
from geofast.gram import Gram
from geofast.models.inputs import text_collate
from geofast.models.model import Model
from geofast.plan import Task
from geofast.request import Labelled
from geofast.rows import Rows
from geofast.solving import fit_probes, solve_all

POOLS = {"vit": ["cls", "mean:patch"], "llama": ["last", "mean", "max:text"]}


def batches(family):
    torch.manual_seed(0)
    if family == "vit":
        return [{"pixel_values": torch.randn(n, 3, 32, 32)} for n in (3, 2)]
    mask = torch.ones(4, 6, dtype=torch.int64)
    mask[1, 4:] = mask[3, :2] = 0
    return [{"input_ids": torch.randint(3, 99, (4, 6)), "attention_mask": mask}]


def near(family, rows=None):
    model = getattr(tiny, family)()
    with torch.no_grad(), gf.capture(model, pool=POOLS[family], rows=rows) as found:
        for batch in batches(family):
            model(**batch)
    return dict(found)


def far(gpu, family, rows, spoil=lambda model, batch: None):
    """Capture on the device; return the rows and where the host waited in a forward pass."""
    model = getattr(tiny, family)().to(DEVICE)
    waits = []
    with torch.no_grad(), gf.capture(model, pool=POOLS[family], rows=rows):
        for batch in batches(family):
            there = {name: value.to(DEVICE) for name, value in batch.items()}
            spoil(model, there)
            before = len(gpu.syncs)
            model(**there)
            waits += gpu.syncs[before:]
    return waits


def bare(gpu, family):
    model, waits = getattr(tiny, family)().to(DEVICE), []
    with torch.no_grad():
        for batch in batches(family):
            there = {name: value.to(DEVICE) for name, value in batch.items()}
            before = len(gpu.syncs)
            model(**there)
            waits += gpu.syncs[before:]
    return waits


def pool(x, roles, jobs):
    _reference.pool(x.near, roles.near, [(op, bit, out.near) for op, bit, out in jobs])


def grams(xs, shifts, z, order, offsets, outs, *, products):
    offsets = getattr(offsets, "near", offsets)
    for x, shift, out in zip(xs, shifts, outs, strict=True):
        _reference.gram(x.near, shift.near, z.near, order.near, offsets, out.near)


# What the device runs without the host, on the numbers themselves, and torch for all else.
KERNELS = SimpleNamespace(**(vars(_device) | {"pool": pool, "grams": grams}))


@pytest.fixture
def gpu(monkeypatch):
    real = _ops.backend
    monkeypatch.setattr(_ops, "backend", lambda d: KERNELS if d == DEVICE else real(d))
    # A wrapped tensor cannot be an inference tensor.
    monkeypatch.setattr(Model, "forward", torch.no_grad()(Model.forward.__wrapped__))
    with Pretend() as gpu:
        yield gpu


@pytest.mark.parametrize("family", POOLS)
@pytest.mark.parametrize("stay", [True, False])
def test_a_forward_pass_waits_for_nothing_that_the_model_does_not(gpu, family, stay):
    rows = Rows(stay=stay)
    assert far(gpu, family, rows) == bare(gpu, family)
    assert {x.device.type for x in rows.values()} == {DEVICE.type if stay else "cpu"}
    for key, expected in near(family).items():
        torch.testing.assert_close(rows[key].cpu(), expected, rtol=1e-5, atol=1e-5)


def test_what_is_not_finite_is_told_after_the_pass(gpu):
    def spoil(model, batch):
        if len(batch["pixel_values"]) == 2:
            batch["pixel_values"][1] = torch.inf

    rows = Rows(stay=True)
    with pytest.raises(
        NonFiniteError, match=r"^vision.embed/mean:patch: sample 4 has NaN"
    ) as caught:
        far(gpu, "vit", rows, spoil)
    assert caught.value.sample == 4


def test_a_lack_of_tokens_is_told_after_the_pass(gpu):
    def spoil(model, batch):
        batch["attention_mask"][2] = 0

    with pytest.raises(
        NoTokenError, match=r"'last' at lm.embed: sample 2 has no all token"
    ) as caught:
        far(gpu, "llama", Rows(), spoil)
    assert caught.value.sample == 2


def test_a_pass_that_failed_blames_no_sample_of_the_next(gpu):
    model = tiny.vit().to(DEVICE)
    batch = batches("vit")[0]["pixel_values"]

    def run(pixels):
        model(pixel_values=pixels.to(DEVICE))

    with torch.no_grad(), gf.capture(model, pool="mean") as rows:
        run(batch)
        broken = model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(torch.full_like(batch, torch.nan))
        broken.remove()
        run(batch)
    assert rows.n == 6


def test_samples_are_named_by_their_number_of_each_prompt_and_after_a_retreat(gpu):
    model, good = tiny.vit().to(DEVICE), batches("vit")[0]["pixel_values"]
    bad = good.index_fill(0, torch.tensor([1]), torch.nan)
    with torch.no_grad(), gf.capture(model, "*.embed", "mean", rows=(rows := Rows())):

        def run(*batches):
            for pixels in batches:
                model(pixel_values=pixels.to(DEVICE))

        def fails(key, sample):
            with pytest.raises(NonFiniteError, match=rf"^{key}: sample {sample} has") as caught:
                rows.verify()
            assert caught.value.sample == sample

        run(good)
        mark = rows.mark()
        run(bad)
        rows.rewind(mark)
        run(good, bad, good)
        fails("vision.embed/mean", 7)
        rows.clear()
        run(good, bad)
        fails("vision.embed/mean", 4)
        rows.clear()
        run(good)
        rows.label = "why"
        run(bad)
        rows.label = ""
        run(bad)
        fails("vision.embed/mean/why", 1)


def test_rows_that_are_forgotten_are_not_looked_into(gpu):
    rows = Rows(stay=True)
    with pytest.raises(NonFiniteError):
        far(gpu, "vit", rows, lambda model, batch: batch["pixel_values"].fill_(torch.nan))
    assert rows.unverified == 0
    rows.clear()
    far(gpu, "vit", rows)
    assert rows.n == 5


@pytest.mark.parametrize("capacity", [3, 100])
def test_a_device_that_fills_up_loses_nothing(gpu, monkeypatch, capacity):
    """What it has stays there, unless it grows; the CPU takes the rest."""
    expected, make, fits = near("vit"), torch.empty, 2

    def empty(*shape, **options):
        nonlocal fits
        if options.get("device") == DEVICE and shape[0] >= capacity:
            fits -= 1
            if fits < 0:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return make(*shape, **options)

    monkeypatch.setattr(torch, "empty", empty)
    rows = Rows(capacity, stay=True)
    far(gpu, "vit", rows)
    assert rows.crowded == str(DEVICE)
    assert [x.is_cpu for x in rows.values()] == [capacity == 3] * 2 + [True] * 4
    for key, x in expected.items():
        torch.testing.assert_close(rows[key].cpu(), x, rtol=1e-5, atol=1e-5)


def test_statistics_stay_where_they_are_when_their_rows_move(gpu):
    r = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 4, generator=r), torch.randn(30, 2, generator=r)
    cell = torch.randint(3, (30,), generator=r)
    statistics, expected = Statistics(3, Budget(1), Rows().aside), Gram(4, 2, 3)
    for part, device in ((slice(15), DEVICE), (slice(15, 30), torch.device("cpu"))):
        statistics.add({"a": x[part].to(device), "b": x[part]}, y[part], cell[part])
        expected.update(x[part], y[part], cell[part])
    for gram, device in zip(statistics.grams.values(), (DEVICE, torch.device("cpu")), strict=True):
        assert gram.matrix.device == device
        torch.testing.assert_close(gram.cpu().matrix, expected.matrix, rtol=1e-12, atol=1e-12)


def test_statistics_that_a_device_has_no_room_for_are_kept_on_the_cpu(gpu, monkeypatch):
    def full(*args, device, **options):
        if device == DEVICE:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Gram(*args, device=device, **options)

    monkeypatch.setattr("geofast.accumulate.Gram", full)
    x, y, cell = torch.randn(20, 4), torch.randn(20, 2), torch.zeros(20, dtype=torch.int64)
    statistics = Statistics(1, budget := Budget(1), Rows().aside)
    for part in (slice(8), slice(8, 20)):
        statistics.add({"a": x[part].to(DEVICE)}, y[part], cell[part])
    expected = Gram(4, 2).update(x, y)
    about = statistics.grams["a"]._about(expected.shift)
    torch.testing.assert_close(about, expected.matrix, rtol=1e-6, atol=1e-6)
    assert budget.warnings == [
        f"rows or statistics were kept in the CPU's ordinary memory instead of {DEVICE} after "
        "out-of-memory; nothing was lost"
    ]


def test_statistics_are_added_to_without_waiting(gpu):
    r = torch.Generator().manual_seed(0)
    x = {key: torch.randn(30, d, generator=r) for key, d in {"a": 4, "b": 4, "c": 3}.items()}
    y, cell = torch.randn(30, 2, generator=r), torch.randint(-1, 3, (30,), generator=r)
    there = {key: rows.to(DEVICE) for key, rows in x.items()}
    statistics = Statistics(3, Budget(1), Rows().aside)
    before = len(gpu.syncs)
    for part in (slice(10), slice(10, 30)):
        statistics.add({key: rows[part] for key, rows in there.items()}, y[part], cell[part])
    # The copies of targets and order go to the device, and nothing comes back.
    assert {*gpu.syncs[before:]} <= {"_to_copy"}
    for key, gram in statistics.grams.items():
        expected = Gram(x[key].shape[1], 2, 3)
        for part in (slice(10), slice(10, 30)):
            expected.update(x[key][part], y[part], cell[part])
        torch.testing.assert_close(gram.cpu().matrix, expected.matrix, rtol=1e-12, atol=1e-12)


def test_every_token_becomes_statistics_without_waiting(gpu):
    found = {}
    for device in (DEVICE, torch.device("cpu")):
        model, waits = tiny.llama().to(device), []
        statistics, rows = Statistics(2, Budget(1), Rows().aside), Rows(stay=True)
        rows.take_tokens = statistics.tokens.take
        with torch.no_grad(), gf.capture(model, pool=["each:text"], rows=rows):
            for batch in batches("llama") * 2:
                there = {name: value.to(device) for name, value in batch.items()}
                y, cell = torch.arange(8.0).view(4, 2), torch.tensor([0, 1, 1, 0])
                statistics.tokens.begin(range(4), y, cell)
                before = len(gpu.syncs)
                model(**there)
                waits.append(gpu.syncs[before:])
        found[device.type] = {key: gram.cpu() for key, gram in statistics.grams.items()}
        # The first batch's targets set the shift; of a later one nothing is waited for.
        assert waits[1] == (bare(gpu, "llama") if device == DEVICE else [])
    assert len(found["cpu"]) == 4
    for key, gram in found["cpu"].items():
        assert gram.count.tolist() == [2 * 10, 2 * 10]
        about = found[DEVICE.type][key]._about(gram.shift)
        torch.testing.assert_close(about, gram.matrix, rtol=1e-5, atol=1e-5)


WORDS = [f"w{i} w{i % 7} w{i % 3}" if i % 2 else f"w{i}" for i in range(1, 40)]


def language(device=None):
    module = tiny.llama()
    model = gf.load(module, prepare=text_collate(tiny.tokenizer(), module.base_model))
    if device is not None:
        module.to(device)
    return model


Y = torch.stack([torch.arange(39.0), torch.arange(39.0).cos()], 1).double()
FOLD = torch.arange(39) % 3
TASK = Task("kfold", "", FOLD, fold_of_cell=torch.arange(3))


def samples_of(texts):
    names = [f"id{i}" for i in range(len(texts))]
    return from_arrays(texts, np.arange(39.0), np.arange(39.0), id=names)


def extracted(model, kind, stay=False):
    lengths = {"": Lengths(np.array([len(text.split()) for text in WORDS]))}
    with torch.no_grad():
        return extract(
            model, {"": samples_of(WORDS)}, Storage(kind, Y, FOLD, stay=stay),
            sites=None, pool=["last", "mean"], lengths=lengths, budget=Budget(24),
            workers=0, strict=False, progress=False,
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["rows", "gram"])
@pytest.mark.parametrize("stay", [True, False])
def test_what_a_pass_on_a_device_leaves_is_right_and_solved_there(gpu, kind, stay, monkeypatch):
    monkeypatch.setattr("geofast.extract._FLUSH", 10)
    found, expected = extracted(language(DEVICE), kind, stay), extracted(language(), kind)
    assert found.kept.tolist() == expected.kept.tolist()
    if kind == "rows":
        assert {x.device for x in found.rows.values()} == {DEVICE if stay else torch.device("cpu")}
        for key, rows in expected.rows.items():
            torch.testing.assert_close(found.rows[key].cpu(), rows, rtol=1e-5, atol=1e-5)
    else:
        for key, gram in expected.grams.items():
            assert found.grams[key].matrix.device == (DEVICE if stay else torch.device("cpu"))
            assert found.grams[key].count.tolist() == gram.count.tolist()
            about = found.grams[key].cpu()._about(gram.shift)
            torch.testing.assert_close(about, gram.matrix, rtol=1e-4, atol=1e-4)
    for select in ("loo", "gcv", "folds") if kind == "rows" else ("gcv", "folds"):
        for a, b in zip(solved(found, select), solved(expected, select), strict=True):
            assert (a.site, a.pool, a.n, a.d) == (b.site, b.pool, b.n, b.d)
            assert a.solution.alpha.tolist() == b.solution.alpha.tolist()
            torch.testing.assert_close(a.solution.r2, b.solution.r2, rtol=1e-4, atol=1e-4)
    probes = [fit_probes(one, Y, TASK, ["a", "b"], gf.ALPHAS, "gcv") for one in (found, expected)]
    for name, probe in probes[1].items():
        assert probes[0][name].alpha == probe.alpha
        torch.testing.assert_close(probes[0][name].coef, probe.coef, rtol=1e-3, atol=1e-4)


def solved(found, select):
    given = Labelled(samples_of(WORDS), Y, {})
    one, failed = solve_all({"": found}, given, [TASK], ["a", "b"], gf.ALPHAS, select)
    assert failed == []
    return one


def test_the_sample_with_an_activation_that_is_not_finite_is_named(gpu):
    model = language(DEVICE)
    with torch.no_grad():
        model.module.get_input_embeddings().weight[tiny.tokenizer()("w38")["input_ids"][0]] = (
            torch.inf
        )
    message = "lm.embed/last: sample .* has NaN.* That is arrays, id id37"
    with pytest.raises(NonFiniteError, match=message):
        extracted(model, "gram", stay=True)


def test_the_sample_that_is_tried_first_is_named(gpu):
    """It is the longest, and not the first of the data."""
    model, texts = language(DEVICE), ["w1", "w2 w3 w4"]
    with torch.no_grad():
        model.module.model.layers[1].mlp.down_proj.weight.fill_(torch.nan)
    lengths = {"": Lengths(np.array([1, 3]))}
    names = from_arrays(texts, np.arange(2.0), np.arange(2.0), id=["short", "long"])
    with pytest.raises(NonFiniteError, match=r"lm.layers.1/last: .* That is arrays, id long\."):
        try_one(model, {"": names}, lengths, None, "last")


@pytest.mark.parametrize("family", [families.llava, families.llava_next, families.internvl])
def test_images_and_their_tiles_inside_a_language_model_are_not_waited_for(gpu, family, tmp_path):
    r = np.random.default_rng(0)
    pixels = (r.integers(0, 255, (*size, 3), dtype=np.uint8) for size in ((40, 40), (30, 64)))
    images = [*map(Image.fromarray, pixels)]
    model = gf.load(families.save(family, tmp_path)).asking(["w1 w2", "w3 w4 w5 w6"])
    pools = {"vision": ["mean:patch", "max"], "projector": "mean", "lm": ["last", "mean:image"]}
    batch, found, waits = model.prepare(images), [], []
    for device in (torch.device("cpu"), DEVICE):
        model.module.to(device)
        there, rows = model.to_device(batch), Rows(stay=True)
        gpu.syncs.clear()
        model.forward(there)
        waits.append([*gpu.syncs])
        with gf.capture(model, pool=pools, rows=rows):
            gpu.syncs.clear()
            model.forward(there, lambda i, rows=rows: setattr(rows, "label", str(i)))
            assert gpu.syncs == waits[-1]
        found.append(dict(rows))
    for key, expected in found[0].items():
        torch.testing.assert_close(found[1][key].cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [5, 0])
def test_torch_pools_without_waiting_where_no_kernel_serves(gpu, tokens):
    r = torch.Generator().manual_seed(0)
    x = torch.randn(4, tokens, 8, generator=r)
    roles = torch.randint(2, (4, tokens), generator=r, dtype=torch.uint8)
    roles[0] = 0
    found = []
    for device in (torch.device("cpu"), DEVICE):
        there = x.to(device), roles.to(device)
        out = {op: torch.empty(4, 8, device=device) for op in ("first", "last", "mean", "max")}
        gpu.syncs.clear()
        _reference.pool(*there, [(op, 0, rows) for op, rows in out.items()])
        assert gpu.syncs == []
        found.append({op: rows.cpu() for op, rows in out.items()})
    for op, expected in found[0].items():
        torch.testing.assert_close(found[1][op], expected, equal_nan=True)


def test_in_a_cuda_graph_nobody_looks_for_what_is_not_finite(gpu, monkeypatch):
    model, rows = tiny.vit().to(DEVICE), Rows(stay=True)
    asked = {"vision.layers.*": 2, "vision.embed": 1}
    for graph in (False, True):
        module = import_module("geofast.capture")
        monkeypatch.setattr(module, "capturing", lambda _, graph=graph: graph)
        for site, count in asked.items():
            with torch.no_grad(), gf.capture(model, site, ["cls", "mean"], rows=rows):
                model(**{k: v.to(DEVICE) for k, v in next(iter(batches("vit"))).items()})
                assert len(rows._watched) == (0 if graph else 2 * count + 2)  # and two roles
