"""Batches by a budget of tokens, and what happens when memory runs out."""

import families
import numpy as np
import pytest
import tiny
import torch

import geofast as gf
from geofast import batching
from geofast.batching import Budget, Lengths, longest_first, numbers, out_of_memory, token_counts
from geofast.data import from_arrays
from geofast.gram import update
from geofast.models.inputs import text_collate

NO_MEMORY = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory"),
    "no allocator of torch's": RuntimeError("CUDA error: out of memory"),
    "triton": RuntimeError("Triton Error [CUDA]: out of memory"),
    "cudnn": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cpu": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    "python": MemoryError(),
}


def test_a_batch_stays_within_tokens_and_samples():
    budget = Budget(100, 20)
    assert [budget.fit(n) for n in (1, 5, 6, 50, 51, 100, 1000)] == [20, 20, 16, 2, 1, 1, 1]
    lengths = np.array([60, 40, 30, 30, 30, 5, 5, 5])
    sizes = budget.sizes(lengths)
    assert sizes == [1, 2, 3, 2]
    starts = np.cumsum([0, *sizes[:-1]])
    assert all(n * lengths[s] <= 100 for n, s in zip(sizes, starts, strict=True))
    assert budget.sizes(lengths[:0]) == []


def test_a_budget_shrinks_to_half_of_what_did_not_fit():
    budget = Budget(4000)
    assert budget.warnings == []
    budget.shrink(10, 300)
    assert (budget.fit(300), budget.fit(100), budget.fit(2000)) == (5, 15, 1)
    budget.shrink(15, 100)
    assert budget.fit(100) == 7
    (warning,) = budget.warnings
    assert "batches were cut to 7 samples (700 tokens) after out-of-memory" in warning


def test_the_sentence_gives_the_range():
    images, texts = Lengths(np.full(50, 257)), Lengths(np.array([100, 4, 10]))
    assert Budget(1000).sentence([images]) == "batches of 3 samples, at most 1,000 tokens"
    assert Budget(100).sentence([texts]) == "batches of 1 to 3 samples, at most 100 tokens"
    assert Budget(100, 2).sentence([texts]) == "batches of 1 to 2 samples, at most 100 tokens"


def test_images_are_as_long_as_they_are_large():
    lengths = Lengths(np.full(9, 50), 50 / 300)
    inputs = [torch.zeros(3, 10, 10), {"image": torch.zeros(3, 10, 20), "tiles": [torch.ones(1)]}]
    assert [numbers(x) for x in inputs] == [300, 601]
    assert lengths.of(np.array([3, 4]), inputs).tolist() == [50, 101]
    assert Lengths(np.arange(9)).of(np.array([3, 4]), inputs).tolist() == [3, 4]
    assert longest_first(np.array([1, 3, 1, 3])).tolist() == [1, 3, 0, 2]


def test_tokens_are_counted_without_padding():
    mask = torch.tensor([[1, 1, 0], [0, 1, 0]])
    ids = torch.zeros(2, 3, dtype=torch.int64)
    assert token_counts({"input_ids": ids, "attention_mask": mask}, 2) == [2, 1]
    assert token_counts({"input_ids": ids}, 2) == [3, 3]
    assert token_counts({"offsets": torch.zeros(2)}, 2) == [1, 1]


def test_what_out_of_memory_is():
    assert all(map(out_of_memory, NO_MEMORY.values()))
    assert not out_of_memory(RuntimeError("shapes cannot be multiplied"))
    assert not out_of_memory(ValueError("can't allocate memory"))


# ------ results do not depend on batches


def texts(n=40):
    r = np.random.default_rng(0)
    words = [" ".join(["w5"] * int(r.integers(1, 30))) + f" w{i % 60}" for i in range(n)]
    return from_arrays(words, r.uniform(-60, 60, n), r.uniform(-90, 90, n))


def photos(n=24, sizes=((40, 40), (30, 64), (70, 35), (40, 40))):
    r = np.random.default_rng(1)
    images = [r.integers(0, 255, (*sizes[i % len(sizes)], 3), dtype=np.uint8) for i in range(n)]
    return from_arrays(images, r.uniform(-60, 60, n), r.uniform(-90, 90, n))


@pytest.fixture(scope="module")
def language():
    module = tiny.llama()
    return gf.load(module, prepare=text_collate(tiny.tokenizer(), module.base_model))


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    return gf.load(families.save(families.qwen2_vl, tmp_path_factory.mktemp("qwen")))


def budget_of(monkeypatch, tokens):
    monkeypatch.setitem(batching._TOKENS, "cpu", tokens)


def assert_same(run, expected):
    """The same to what float32 rounds off, in the same order."""
    assert run.samples["id"].tolist() == expected.samples["id"].tolist()
    if expected.rows is not None:
        assert run.rows.keys() == expected.rows.keys()
        for name, rows in expected.rows.items():
            torch.testing.assert_close(run.rows[name], rows, atol=1e-5, rtol=1e-4)
        return
    assert run.grams.keys() == expected.grams.keys()
    for name, gram in expected.grams.items():
        theirs = run.grams[name]._about(gram.shift)  # the shift is that of the first batch
        scale = gram.matrix.diagonal(dim1=1, dim2=2).sqrt()
        error = (theirs - gram.matrix).abs() / (scale[:, :, None] * scale[:, None] + 1e-9)
        assert float(error.max()) < 1e-4


@pytest.mark.parametrize("storage", ["rows", "gram"])
@pytest.mark.parametrize("tokens", [1, 60, 10_000])
def test_texts_in_any_batches(language, monkeypatch, tokens, storage):
    options = dict(split=gf.KFold(2), storage=storage, prompts=["{text}", "w1 {text}"])
    expected = gf.probe(language, texts(), batch_size=1, **options)
    budget_of(monkeypatch, tokens)
    run = gf.probe(language, texts(), **options)
    assert_same(run, expected)
    largest = run.info["batch"]["samples"]
    low, high = {1: (1, 1), 60: (3, 20), 10_000: (40, 40)}[tokens]
    assert low <= largest <= high
    assert run.info["batch"]["tokens"] == tokens
    assert run.info["warnings"] == expected.info["warnings"]


@pytest.mark.parametrize("storage", ["rows", "gram"])
def test_images_of_mixed_sizes_in_any_batches(talking, monkeypatch, storage):
    options = dict(split=gf.KFold(2), storage=storage, prompts=["w1", "w2 w3"], workers=0)
    expected = gf.probe(talking, photos(), batch_size=1, **options)
    for tokens, low, high in ((500, 2, 5), (100_000, 24, 24)):
        budget_of(monkeypatch, tokens)
        run = gf.probe(talking, photos(), **options)
        assert_same(run, expected)
        assert low <= run.info["batch"]["samples"] <= high


def test_batches_hold_as_many_tokens_as_they_may(talking, monkeypatch):
    """A batch that was loaded by the length of the first image is cut where others are longer."""
    budget_of(monkeypatch, 400)
    seen = []
    tower = next(t for t in talking.towers if t.name == "vision")
    note = tower.blocks[0].register_forward_pre_hook(lambda _m, args: seen.append(len(args[0])))
    sizes = ((32, 32), (64, 64), (48, 32))
    run = gf.probe(
        talking, photos(sizes=sizes), sites="vision.*", split=gf.KFold(2), workers=0, check=False
    )
    note.remove()
    assert max(seen) <= 400
    assert len(seen) > 3
    assert run.info["counts"]["read"] == 24


# ------ memory runs out


class Full:
    """Raises where more than `most` samples run, at the calls of a block that `when` names."""

    def __init__(self, block, most, error, count=len, when=lambda _: True):
        self.calls = self.refused = 0
        self.most, self.error, self.count, self.when = most, error, count, when
        self.hook = block.register_forward_pre_hook(self.check)

    def check(self, _module, args):
        self.calls += 1
        if self.when(self.calls) and self.count(args[0]) > self.most:
            self.refused += 1
            raise self.error


@pytest.fixture
def full():
    made = []

    def make(*args, **options):
        made.append(Full(*args, **options))
        return made[-1]

    yield make
    for one in made:
        one.hook.remove()


@pytest.mark.parametrize("storage", ["rows", "gram"])
@pytest.mark.parametrize("kind", NO_MEMORY)
def test_texts_that_do_not_fit_run_in_halves(language, full, kind, storage):
    options = dict(split=gf.KFold(2), storage=storage, prompts=["{text}", "w1 {text}"], check=False)
    expected = gf.probe(language, texts(), **options)
    refusing = full(language.towers[0].blocks[1], 6, NO_MEMORY[kind])
    run = gf.probe(language, texts(), **options)
    assert_same(run, expected)
    assert refusing.refused
    warnings = set(run.info["warnings"]) - set(expected.info["warnings"])
    (told,) = warnings
    assert "after out-of-memory" in told
    assert run.info["batch"]["samples"] <= 6
    cut = int(told.split("cut to ")[1].split()[0])
    assert 0 < cut <= 6


@pytest.mark.parametrize("storage", ["rows", "gram"])
@pytest.mark.parametrize("where", ["vision", "first prompt", "second prompt"])
def test_images_that_do_not_fit_lose_and_double_nothing(talking, full, where, storage):
    """Rows of the vision tower and of earlier prompts were counted already."""
    options = dict(split=gf.KFold(2), storage=storage, prompts=["w1", "w2"], workers=0, check=False)
    same = photos(sizes=((40, 40),))
    expected = gf.probe(talking, same, **options)
    towers = {t.name: t for t in talking.towers}
    if where == "vision":  # patches of all images in one sequence, 100 an image
        refusing = full(towers["vision"].blocks[2], 400, NO_MEMORY["cuda"])
    else:  # the dry run over one image is the first call of each
        second = where == "second prompt"
        refusing = full(
            towers["lm"].blocks[2], 4, NO_MEMORY["cuda"], when=lambda call: call % 2 != second
        )
    run = gf.probe(talking, same, **options)
    assert refusing.refused
    assert_same(run, expected)
    assert "after out-of-memory" in " ".join(run.info["warnings"])


def test_the_smaller_batch_stays(language, full):
    """Also for the twin and the next prompt: it would run out there again."""
    refusing = full(language.towers[0].blocks[0], 5, NO_MEMORY["cuda"])
    options = dict(split=gf.KFold(2), check=False, controls="random-weights")
    run = gf.probe(language, from_arrays(["w1 w2"] * 32, range(32), range(32)), **options)
    assert refusing.refused == 3  # of 32, 16 and 8
    assert run.info["batch"] == {"samples": 4, "tokens": 8}


@pytest.mark.parametrize("kind", NO_MEMORY)
def test_a_sample_that_does_not_fit_alone_is_named(language, full, kind):
    samples = from_arrays(["w1", "w2 " * 50, "w3", "w4"], range(4), range(4), ids=list("abcd"))
    full(language.towers[0].blocks[1], 49, NO_MEMORY[kind], count=lambda hidden: hidden.shape[1])
    with pytest.raises(RuntimeError, match="arrays, id b does not fit into the memory of cpu"):
        gf.probe(language, samples, split=gf.KFold(2), check=False)


def test_another_error_is_no_lack_of_memory(language, full):
    refusing = full(language.towers[0].blocks[1], 3, RuntimeError("no such kernel"))
    with pytest.raises(RuntimeError, match=r"no such kernel\. The batch held arrays, id"):
        gf.probe(language, texts(), split=gf.KFold(2), check=False)
    assert refusing.refused == 1


class FullUpdate:
    """Statistics that run out of memory beyond `most` rows, when the first cell is added."""

    def __init__(self, error, most=7):
        self.error, self.most, self.refused = error, most, 0

    def __call__(self, grams, rows, y, cell):
        if len(y) <= self.most:
            return update(grams, rows, y, cell)
        self.refused += 1
        first = cell[cell >= 0].min() if (cell >= 0).any() else 0
        update(grams[:1], rows[:1], y, torch.where(cell == first, cell, -1))
        raise self.error


@pytest.mark.parametrize("kind", NO_MEMORY)
def test_statistics_that_ran_out_of_memory_halfway_count_every_row_once(
    language, monkeypatch, kind
):
    splits = [gf.KFold(3), gf.Blocks(30)]
    options = dict(split=splits, storage="gram", check=False, sites=["lm.embed", "lm.layers.2"])
    expected = gf.probe(language, texts(), **options)
    full = FullUpdate(NO_MEMORY[kind])
    monkeypatch.setattr("geofast.accumulate.update", full)
    monkeypatch.setattr("geofast.extract._FLUSH", 30)
    run = gf.probe(language, texts(), **options)
    assert full.refused == 3  # of 33, 16 and 8 rows of the first site; the second is told
    assert_same(run, expected)
    for name, gram in expected.grams.items():
        assert run.grams[name].count.tolist() == gram.count.tolist()
    (told,) = {*run.info["warnings"]} - {*expected.info["warnings"]}
    assert told == (
        "statistics were added to by at most 4 rows at once after out-of-memory; nothing was lost"
    )


@pytest.mark.parametrize("kind", NO_MEMORY)
def test_statistics_that_do_not_take_a_row_are_named(language, monkeypatch, kind):
    monkeypatch.setattr("geofast.accumulate.update", FullUpdate(NO_MEMORY[kind], most=0))
    with pytest.raises(RuntimeError, match=r"the statistics of lm\.embed/last and 3 more do not"):
        gf.probe(language, texts(), split=gf.KFold(2), storage="gram", check=False)


def test_another_error_of_statistics_is_no_lack_of_memory(language, monkeypatch):
    full = FullUpdate(ValueError("no such kernel"))
    monkeypatch.setattr("geofast.accumulate.update", full)
    with pytest.raises(ValueError, match="no such kernel"):
        gf.probe(language, texts(), split=gf.KFold(2), storage="gram", check=False)
    assert full.refused == 1
