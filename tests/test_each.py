"""Every token a row, against the rows themselves in float64."""

import numpy as np
import pytest
import tiny
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score

import geofast as gf
from geofast.capture import NonFiniteError
from geofast.data import from_arrays
from geofast.models.inputs import stack_images, text_collate
from geofast.models.model import Model

ALPHAS = [0.1, 10.0, 1000.0]
SITES = ["lm.embed", "lm.layers.2"]


@pytest.fixture(scope="module")
def language():
    module = tiny.llama()
    return gf.load(module, prepare=text_collate(tiny.tokenizer(), module.base_model))


@pytest.fixture(scope="module")
def vision():
    made = gf.load(tiny.dinov2(), prepare=stack_images)
    return Model(made.name, made.module, made.stages, "image", to_tensor, stack_images)


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def texts(n=60):
    r = np.random.default_rng(0)
    words = [" ".join(f"w{i}" for i in r.integers(0, 98, r.integers(1, 7))) for _ in range(n)]
    return from_arrays(words, r.uniform(-60, 60, n), r.uniform(-170, 170, n))


def images(n=30):
    r = np.random.default_rng(0)
    pixels = [r.integers(0, 255, (28, 28, 3), dtype=np.uint8) for _ in range(n)]
    return from_arrays(pixels, r.uniform(-60, 60, n), r.uniform(-170, 170, n))


def expected_r2(x, sample, samples, fold, alpha):
    """Mean R2 over targets and folds of scikit-learn's ridge on the tokens themselves."""
    y = samples.table[["latitude", "longitude"]].to_numpy()[sample]
    fold, scores = fold[sample], []
    for f in range(fold.max() + 1):
        ridge = Ridge(alpha=alpha).fit(x[fold != f], y[fold != f])
        scores.append(r2_score(y[fold == f], ridge.predict(x[fold == f])))
    return float(np.mean(scores))


def folds_of(run):
    return run.samples["fold_kfold"].to_numpy()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_words_of_padded_texts(language, alpha):
    samples = texts()
    run = gf.probe(
        language, samples, sites=SITES, pool=["last", "each:text"], split=gf.KFold(3),
        alphas=[alpha], batch_size=7, check=False,
    )  # fmt: skip
    with gf.capture(language, SITES, ["each:text"]) as rows:
        for text in samples.inputs:  # one by one, so that nothing is padded
            language.forward(language.prepare([text]))
    lengths = [len(text.split()) for text in samples.inputs]
    sample = np.repeat(np.arange(len(lengths)), lengths)
    table = run.layers.set_index(["site", "pool"])
    for site in SITES:
        found, x = table.loc[(site, "each:text")], rows[f"{site}/each:text"].double().numpy()
        assert found["n"] == len(x) == len(sample)
        assert found["r2"] == pytest.approx(
            expected_r2(x, sample, samples, folds_of(run), alpha), abs=2e-6
        )
        assert table.loc[(site, "last"), "n"] == len(samples)


def test_patches_of_images_and_the_rows_that_capture_makes_of_them(vision):
    samples = images()
    run = gf.probe(vision, samples, pool="each:patch", split=gf.KFold(3), alphas=[1.0], workers=0)
    with gf.capture(vision, pool="each:patch") as rows:
        vision.forward(vision.prepare(list(samples.inputs)))
    hidden = []
    watch = vision.module.encoder.layer[1].register_forward_hook(lambda *a: hidden.append(a[2]))
    vision.forward(vision.prepare(list(samples.inputs)))
    watch.remove()
    patches = (hidden[0][0] if isinstance(hidden[0], tuple) else hidden[0])[:, 1:]
    torch.testing.assert_close(rows["vision.layers.1/each:patch"], patches.flatten(0, 1))
    sample = np.repeat(np.arange(len(samples)), patches.shape[1])
    for _, found in run.layers.iterrows():
        x = rows[f"{found['site']}/each:patch"].double().numpy()
        assert found["n"] == len(x) == len(samples) * 4
        expected = expected_r2(x, sample, samples, folds_of(run), 1.0)
        assert found["r2"] == pytest.approx(expected, abs=2e-6)


def test_every_token_counts_once_where_memory_runs_out(language):
    """The first sites of a batch have its tokens already when a later block fails."""
    options = dict(pool="each:text", split=gf.KFold(3), check=False, sites="lm.layers.*")
    expected = gf.probe(language, texts(), **options)
    refused = []

    def refuse(_module, args):
        if len(args[0]) > 5:
            refused.append(len(args[0]))
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = language.towers[0].blocks[2].register_forward_pre_hook(refuse)
    try:
        run = gf.probe(language, texts(), **options)
    finally:
        hook.remove()
    assert len(refused) > 1
    for key, gram in expected.grams.items():
        assert run.grams[key].count.tolist() == gram.count.tolist()
        about = run.grams[key]._about(gram.shift)
        torch.testing.assert_close(about, gram.matrix, rtol=1e-5, atol=1e-5)


def test_every_token_counts_once_where_memory_runs_out_inside_of_the_statistics(
    language, monkeypatch
):
    from geofast import gram as module

    options = dict(pool="each:text", split=gf.KFold(3), check=False, sites="lm.layers.*")
    expected = gf.probe(language, texts(), **options)
    add, failed = module.Batch.add, []

    def short(self, grams, rows):
        if len(rows[0]) > 20 and len(failed) < 9:
            failed.append(len(rows[0]))
            end = int(self.offsets[1 + len(failed) % 3])  # some cells are added
            some = self.offsets.clamp(max=end)
            add(module.Batch(self.z, self.order, some), grams, rows)
            raise torch.OutOfMemoryError("CUDA out of memory")
        add(self, grams, rows)

    monkeypatch.setattr(module.Batch, "add", short)
    run = gf.probe(language, texts(), **options)
    assert len(failed) > 3
    for key, gram in expected.grams.items():
        assert run.grams[key].count.tolist() == gram.count.tolist()
        about = run.grams[key]._about(gram.shift)
        torch.testing.assert_close(about, gram.matrix, rtol=1e-5, atol=1e-5)


def test_a_token_that_is_not_finite_is_named(vision):
    samples = images()
    odd = Model(vision.name, vision.module, vision.stages, "image", spoiled, stack_images)
    with pytest.raises(NonFiniteError, match=r"each:patch: sample 0 .* That is arrays, id 4"):
        gf.probe(
            odd, samples, pool="each:patch", split=gf.KFold(3), batch_size=1, workers=0, check=False
        )


def spoiled(image):
    tensor = to_tensor(image)
    odd = torch.equal(tensor, to_tensor(images().inputs[4]))
    return tensor * torch.inf if odd else tensor


@pytest.mark.parametrize("options", [{"storage": "rows"}, {"select": "loo"}])
def test_rows_of_tokens_are_not_kept(vision, options):
    with pytest.raises(ValueError, match="'each:patch' makes a row of every token, of which"):
        gf.probe(vision, images(), pool=["cls", "each:patch"], **options)


def test_a_plan_counts_every_token(vision):
    plan = gf.plan(vision, images(), pool="each:patch")
    assert plan.seconds["pool"] > 0
    assert "each:patch" in str(plan)
