import itertools
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy.stats import hypergeom
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.metrics import r2_score
from synthetic import KINDS, rows
from test_probe import painted, pixels
from test_ridge import folds_of

import geofast as gf
from geofast.cli import main
from geofast.report import subspace as report
from geofast.subspace import measure, ranking, store
from geofast.subspace.measure import of_grams
from geofast.subspace.ranking import RANKINGS, random_orders
from geofast.subspace.stability import jaccard, jaccard_by_chance, smallest

TARGETS = ("latitude", "longitude")
FRACTIONS = (0.1, 0.25, 0.5, 0.9, 1.0)


def gram_of(x, y, fold):
    return gf.Gram(x.shape[1], y.shape[1], int(fold.max()) + 1).update(x, y, fold)


def curve(found, ranking, target, column="r2"):
    table = found.curves
    here = table[(table["ranking"] == ranking) & (table["target"] == target)]
    return here[column].to_numpy()


# ------ the naive way, in float64


def refit(x, y, train, dims, alpha):
    """Held-out R2 of scikit-learn's ridge on some of the dimensions."""
    model = Ridge(alpha=alpha, solver="cholesky").fit(x[train][:, dims], y[train])
    return r2_score(y[~train], model.predict(x[~train][:, dims]))


def objective(x, y, dims, alpha):
    x, y = x[:, dims] - x[:, dims].mean(0), y - y.mean()
    w = np.linalg.solve(x.T @ x + alpha * np.eye(len(dims)), x.T @ y)
    return np.sum((y - x @ w) ** 2) + alpha * np.sum(w**2)


def naive_order(ranking, x, y, alpha):
    d = x.shape[1]
    if ranking in ("coef", "coef_std"):
        coef = Ridge(alpha=alpha, solver="cholesky").fit(x, y).coef_
        return np.argsort(-np.abs(coef) * (x.std(0) if ranking == "coef_std" else 1))
    chosen, left = [], list(range(d))
    if ranking == "forward":
        while left:
            best = min(left, key=lambda i: objective(x, y, [*chosen, i], alpha))
            chosen.append(best)
            left.remove(best)
        return np.array(chosen)
    while len(left) > 1:
        out = min(left, key=lambda i: objective(x, y, [j for j in left if j != i], alpha))
        chosen.append(out)
        left.remove(out)
    return np.array([*left, *chosen[::-1]])


def naive_curve(ranking, x, y, fold, alphas, target):
    """Mean R2 over folds at every fraction; ranks made in each training part."""
    x, y, fold = x.double().numpy(), y[:, target].numpy(), fold.numpy()
    scores = []
    for f, alpha in enumerate(alphas.tolist()):
        train = fold != f
        order = naive_order(ranking, x[train], y[train], alpha)
        sizes = [max(1, round(x.shape[1] * share)) for share in FRACTIONS]
        scores.append([refit(x, y, train, order[:p], alpha) for p in sizes])
    return np.mean(scores, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(300, 30), (60, 70)])  # and fewer rows than features
def test_curves_are_scikit_learns_refits(kind, shape):
    x, y = rows(*shape, kind=kind, seed=3)
    fold = folds_of(len(x), 4)
    gram = gram_of(x, y, fold)
    found = of_grams(
        {"a/cls": gram}, TARGETS, fractions=FRACTIONS, rankings=["coef", "coef_std"], random=0
    )
    alphas = gf.solve(gram).alpha
    for (t, target), by in itertools.product(enumerate(TARGETS), ["coef", "coef_std"]):
        expected = naive_curve(by, x, y, fold, alphas, t)
        np.testing.assert_allclose(curve(found, by, target), expected, atol=1e-8)


@pytest.mark.parametrize("block", [3, 64])
@pytest.mark.parametrize("by", ["forward", "backward"])
@pytest.mark.parametrize("shape", [(200, 14), (20, 17)])
def test_greedy_orders_are_those_of_refits_of_every_candidate(by, shape, block, monkeypatch):
    monkeypatch.setattr(ranking, "_BLOCK", block)
    x, y = rows(*shape, seed=1)
    fold = folds_of(len(x), 3)
    gram = gram_of(x, y, fold)
    found = of_grams({"a/cls": gram}, TARGETS, fractions=FRACTIONS, rankings=[by], random=0)
    alphas = gf.solve(gram).alpha
    for t, target in enumerate(TARGETS):
        expected = naive_curve(by, x, y, fold, alphas, t)
        np.testing.assert_allclose(curve(found, by, target), expected, atol=1e-8)
    everyone = gf.solve(gram, alphas.unique().tolist(), folds=torch.zeros(3, dtype=torch.int64))
    alpha = float(everyone.alpha)
    order = naive_order(by, x.double().numpy(), y[:, 1].numpy(), alpha)
    assert found.dims("a", "longitude", 1).tolist() == order.tolist()


def test_random_subsets_and_their_interval():
    x, y = rows(300, 20)
    fold, gram = folds_of(300), gram_of(*rows(300, 20), folds_of(300))
    found = of_grams({"a/cls": gram}, TARGETS, fractions=[0.5], rankings=[], random=4, seed=7)
    alphas, train = gf.solve(gram).alpha.tolist(), [fold.numpy() != f for f in range(5)]
    drawn = random_orders(20, 4, 7)
    means = [
        np.mean([refit(x.double().numpy(), y[:, 1].numpy(), s, order[:10], a)
                 for s, a in zip(train, alphas, strict=True)])
        for order in drawn
    ]  # fmt: skip
    half = found.curves[(found.curves["fraction"] == 0.5) & (found.curves["target"] == "longitude")]
    expected = [np.mean(means), min(means), max(means)]
    np.testing.assert_allclose(half[["r2", "r2_low", "r2_high"]].iloc[0], expected, atol=1e-8)
    again = of_grams({"a/cls": gram}, TARGETS, fractions=[0.5], rankings=[], random=4, seed=8)
    assert not np.allclose(again.curves["r2_low"], found.curves["r2_low"])


def test_a_ranking_named_twice_is_measured_once():
    gram = gram_of(*rows(60, 6), folds_of(60))
    once, twice = (
        of_grams({"a/cls": gram}, TARGETS, fractions=np.array([0.5]), rankings=by, random=0).curves
        for by in (["coef"], ["coef", "coef"])
    )
    pd.testing.assert_frame_equal(once, twice)


def test_few_sets_at_a_time_are_the_same(monkeypatch):
    gram = gram_of(*rows(200, 20), folds_of(200))
    whole = of_grams({"a/cls": gram}, TARGETS, protocol="study").curves
    monkeypatch.setattr(measure, "_BYTES", 1)
    pd.testing.assert_frame_equal(
        of_grams({"a/cls": gram}, TARGETS, protocol="study").curves, whole
    )


# ------ leakage, and the study


def layer_of(x, y, fold, protocol="study"):
    asked = measure._asked((0.1, 0.5), RANKINGS, 0, 0, protocol, gf.ALPHAS)
    return measure._layer(measure._Kept("a/cls", gram_of(x, y, fold)), TARGETS, asked, {})


def test_a_training_part_ranks_without_what_it_holds_out():
    x, y = rows(200, 16)
    fold = folds_of(200)
    other = y.clone()
    other[fold == 2] = y[fold == 2].flip(0)
    before, after = layer_of(x, y, fold), layer_of(x, other, fold)
    for by in RANKINGS:
        assert torch.equal(before.order[by][2], after.order[by][2])
        assert not torch.equal(before.order[by][1], after.order[by][1])  # which trained on it
        assert not torch.equal(before.final[by], after.final[by])


def test_of_noise_the_study_finds_something_and_we_do_not():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 150, generator=generator)
    y = torch.randn(200, 2, generator=generator, dtype=torch.float64)
    fold = folds_of(200)
    layer = layer_of(x, y, fold)
    ours, theirs = (layer.r2[by][:, 0, 0].mean() for by in ("coef", "study"))  # of latitude
    assert ours < 0
    assert theirs > 0.05


def gcv_choice(x, y, alphas):
    x, y, n = x - x.mean(0), y - y.mean(), len(x)
    values, vectors = np.linalg.eigh(x.T @ x)
    b = vectors.T @ (x.T @ y)
    curve = []
    for a in alphas:
        error = y - x @ (vectors @ (b / (values + a)))
        curve.append(error @ error / (n - 1 - np.sum(values / (values + a))) ** 2)
    return alphas[int(np.argmin(curve))]


@pytest.mark.parametrize("shape", [(250, 24), (60, 70)])
def test_the_studys_procedure(shape):
    """One order for all, from |coef| of latitude in the best fold; alpha for each refit."""
    x, y = rows(*shape, seed=4)
    fold = folds_of(len(x), 4)
    gram = gram_of(x, y, fold)
    found = of_grams({"a/cls": gram}, TARGETS, fractions=FRACTIONS, protocol="study", random=0)
    solved = gf.solve(gram)
    best = int(solved.r2.mean(1).argmax())
    train = (fold != best).numpy()
    points, f = x.double().numpy(), fold.numpy()
    order = naive_order("coef", points[train], y[train][:, 0].numpy(), float(solved.alpha[best]))
    for t, target in enumerate(TARGETS):
        values, scores = y[:, t].numpy(), []
        for p in [max(1, round(x.shape[1] * share)) for share in FRACTIONS]:
            dims = order[:p]
            alphas = [
                gcv_choice(points[f != i][:, dims], values[f != i], gf.ALPHAS) for i in range(4)
            ]
            scores.append(
                np.mean([refit(points, values, f != i, dims, a) for i, a in enumerate(alphas)])
            )
        np.testing.assert_allclose(curve(found, "study", target), scores, atol=1e-8)
    assert "study" not in set(of_grams({"a/cls": gram}, TARGETS, random=0).curves["ranking"])


def study_by_scikit_learn(x, y, fold, alphas):
    """What the study runs on rows: R2 [F, P, 2], every alpha by RidgeCV's leave-one-out."""
    x, y, fold = x.double().numpy(), y.numpy(), fold.numpy()
    parts, probes = [fold != f for f in range(fold.max() + 1)], []
    for train in parts:
        probe = RidgeCV(alphas).fit(x[train], y[train])
        probes.append((r2_score(y[~train], probe.predict(x[~train])), probe.coef_[0]))
    _, latitude = max(probes, key=lambda probe: probe[0])
    order, scores = np.argsort(-np.abs(latitude)), np.empty((len(parts), len(FRACTIONS), 2))
    for i, share in enumerate(FRACTIONS):
        some = x[:, order[: max(1, round(x.shape[1] * share))]]
        for (f, train), t in itertools.product(enumerate(parts), range(2)):
            model = RidgeCV(alphas).fit(some[train], y[train, t])
            scores[f, i, t] = r2_score(y[~train, t], model.predict(some[~train]))
    return scores


def run_of(kept, x, y, fold, alphas):
    """A run of one layer that keeps these rows."""
    named = dict(zip((*TARGETS, "fold_kfold"), (*y.T.numpy(), fold.numpy()), strict=True))
    info = kept.info | {"arguments": kept.info["arguments"] | {"alphas": list(alphas)}}
    return replace(kept, info=info, samples=pd.DataFrame(named), rows={"a/cls": x}, grams=None)


@pytest.mark.parametrize("shape", [(80, 24), (60, 70), (400, 270)])
def test_of_rows_the_study_leaves_one_out_as_scikit_learn_does(kept, shape):
    x, y = rows(*shape, seed=4)
    # A few rows far out, whose targets are their own: left out, they are far from their fit.
    far = torch.arange(0, len(x), 13)
    x[far] *= 6
    y[far] = y[far].flip(0)
    fold, alphas = folds_of(len(x), 4), np.logspace(-2, 5, 15)
    options = {"fractions": FRACTIONS, "rankings": [], "random": 0, "protocol": "study"}
    found = run_of(kept[0], x, y, fold, alphas).subspace(**options)
    expected = study_by_scikit_learn(x, y, fold, alphas).mean(0)
    without = of_grams({"a/cls": gram_of(x, y, fold)}, TARGETS, alphas=alphas, **options)
    for t, target in enumerate(TARGETS):
        np.testing.assert_allclose(curve(found, "study", target), expected[:, t], atol=1e-8)
        # Generalised cross-validation spreads leverage evenly, and chooses otherwise.
        assert np.abs(curve(without, "study", target) - expected[:, t]).max() > 0.01
    assert (found.study, without.study) == ("loo", "gcv")


def test_which_alphas_the_study_has_is_told(kept, tmp_path):
    options = {"sites": "vision.embed", "rankings": ["coef"], "random": 0}
    said = {"loo": "by leave-one-out, as the study has it", "gcv": "instead of the study's"}
    for run, study in zip(kept, said, strict=True):
        found = run.subspace(protocol="study", **options)
        told = " ".join(str(found).split())
        assert [way for way, words in said.items() if words in told] == [study]
        store.write(found, tmp_path)
        _assert_same(gf.Subspace.open(tmp_path), found)
    without = kept[0].subspace(**options)
    assert without.study == ""
    assert "the study" not in str(without)


@pytest.mark.parametrize(("protocol", "study"), [("study", "gcv"), ("corrected", "")])
def test_folders_of_before_had_no_other_way(protocol, study, tmp_path):
    gram = gram_of(*rows(60, 6), folds_of(60))
    store.write(of_grams({"a/cls": gram}, TARGETS, random=0, protocol=protocol), tmp_path)
    path = tmp_path / store.RANKS
    with safe_open(path, "pt") as file:
        about, ranks = json.loads(file.metadata()["geofast.subspace"]), load_file(path)
    assert about.pop("study") == study
    assert [about.pop(name) for name in ("select", "draws", "train")] == ["", 0, 48]
    save_file(ranks, path, metadata={"geofast.subspace": json.dumps(about)})
    before = gf.Subspace.open(tmp_path)
    assert (before.study, before.select, before.draws, before.train) == (study, "", 0, 0)


# ------ stability, and the smallest set


def test_jaccard_by_hand():
    order = torch.tensor([[[0, 1, 2, 3]], [[1, 0, 3, 2]], [[3, 2, 1, 0]]])
    found = jaccard(order, torch.tensor([1, 2, 3, 4]))[:, 0]
    # Of one: no two agree. Of two: 1, 0, 0. Of three: {0,1,2}, {0,1,3} and {1,2,3}, 2 of 4 each.
    np.testing.assert_allclose(found, [0, 1 / 3, 1 / 2, 1])


def test_jaccard_of_random_sets():
    sizes = torch.tensor([1, 7, 40, 99, 100])
    expected = []
    for p in sizes.tolist():
        x = np.arange(p + 1)
        expected.append(np.sum(hypergeom(100, p, p).pmf(x) * x / (2 * p - x)))
    np.testing.assert_allclose(jaccard_by_chance(100, sizes), expected, rtol=1e-9)
    drawn = torch.stack(random_orders(100, 60, 0))[:, None]
    np.testing.assert_allclose(jaccard(drawn, sizes)[:, 0], expected, atol=0.01)


def test_the_smallest_set_by_hand():
    steady = torch.tensor([[0.5, 0.96, 0.97, 1.0]] * 4, dtype=torch.float64)
    assert smallest(steady) == (1, 1, 1)
    assert smallest(steady, 0.99) == (3, 3, 3)
    # Half of the folds need three sizes more, so the interval spans them.
    mixed = torch.tensor([[0.96, 1, 1, 1], [0.2, 0.3, 0.4, 1]] * 2, dtype=torch.float64)
    assert smallest(mixed) == (3, 0, 3)
    assert smallest(-steady) == (None, None, None)


def test_planted_dimensions_are_found_and_enough():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(600, 40, generator=generator)
    x[:, 3] *= 1000  # its coefficient is small, and it matters
    noise = torch.randn(600, 2, generator=generator)
    y = torch.stack([x[:, 3] / 1000 + x[:, 8], x[:, 20] - x[:, 21]], 1) + 0.1 * noise
    found = of_grams({"a/cls": gram_of(x, y.double(), folds_of(600))}, TARGETS, random=0)
    for by in ("coef_std", "forward", "backward"):
        assert set(found.dims("a", "latitude", 0.05, ranking=by).tolist()) == {3, 8}
        assert set(found.dims("a/cls", "longitude", 0.05, ranking=by).tolist()) == {20, 21}
    assert 3 not in found.dims("a", "latitude", 0.05, ranking="coef")  # its fault: no scale
    few = found.smallest[found.smallest["ranking"] == "forward"]
    assert few["dims"].tolist() == [4, 4]
    assert (few[["fraction", "fraction_low", "fraction_high"]] == 0.1).all(axis=None)
    stable = found.stability.set_index(["ranking", "fraction"])
    assert (stable.loc["forward"]["jaccard"].loc[1.0] == 1).all()
    assert stable["above_chance"].loc["forward"].loc[1.0].isna().all()


# ------ of a run


@pytest.fixture(scope="module")
def kept():
    """The same run, with rows and with statistics of two splits."""
    model = gf.load(tiny.dinov2(layers=2), prepare=pixels)
    options = dict(split=[gf.KFold(), gf.Blocks(30)], select="gcv", pool=["cls", "mean:patch"])
    return [gf.probe(model, painted(), storage=kind, **options) for kind in ("rows", "gram")]


@pytest.mark.parametrize("split", ["kfold", "blocks30"])
def test_rows_and_statistics_say_the_same_and_all_dimensions_the_runs_r2(kept, split):
    by_rows, by_grams = (run.subspace(split=split, rankings=["coef"], random=1) for run in kept)
    pd.testing.assert_frame_equal(by_rows.curves, by_grams.curves, atol=1e-8)
    full = by_rows.curves[(by_rows.curves["fraction"] == 1)].set_index(["site", "pool", "target"])
    table = kept[0].rows_of(split).set_index(["site", "pool"])
    for site, pool in table.index:
        for target in TARGETS:
            expected = table.loc[(site, pool), f"r2_{target}"]
            np.testing.assert_allclose(full.loc[(site, pool, target), "r2"], expected, atol=1e-6)


def test_layers_are_in_the_order_of_the_pass(kept):
    turned = replace(kept[0], rows=dict(reversed(kept[0].rows.items())))
    found, expected = (run.subspace(rankings=["coef"], random=0) for run in (turned, kept[0]))
    pd.testing.assert_frame_equal(found.curves, expected.curves)


def test_statistics_by_group(kept):
    model = gf.load(tiny.dinov2(layers=2), prepare=pixels)
    splits = [gf.KFold(), gf.Blocks(30)]
    run = gf.probe(
        model, painted(), storage="gram", split=splits, group="zone", pool=["cls", "mean:patch"]
    )
    found = run.subspace(sites="vision.layers.*", rankings=["coef"], random=0)
    expected = kept[0].subspace(sites="vision.layers.*", rankings=["coef"], random=0)
    pd.testing.assert_frame_equal(found.curves, expected.curves, atol=1e-8)
    found = run.subspace(split="blocks30", rankings=["coef"], random=0)
    expected = kept[0].subspace(split="blocks30", rankings=["coef"], random=0)
    pd.testing.assert_frame_equal(found.curves, expected.curves, atol=1e-8)
    told = run.info.pop("fold_of_cell")  # as in runs of an older version
    assert len(told["kfold"]) == len(told["blocks30"]) > 5 * 2
    again = run.subspace(sites="vision.embed", rankings=["coef"], random=0)
    expected = kept[0].subspace(sites="vision.embed", rankings=["coef"], random=0)
    pd.testing.assert_frame_equal(again.curves, expected.curves, atol=1e-8)
    with pytest.raises(ValueError, match=r"which of them split 'blocks30' holds out"):
        run.subspace(split="blocks30")
    run.info["fold_of_cell"] = {"kfold": told["kfold"][:-1]}
    with pytest.raises(ValueError, match="they are not of one probe"):
        run.subspace()


def test_the_command(kept, tmp_path, capsys):
    kept[1].save(tmp_path / "run")
    arguments = ["subspace", str(tmp_path / "run"), "--protocol", "study", "--random", "2"]
    some = ["--sites", "vision.layers.1", "vision.embed"]
    assert main([*arguments, *some, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= max(100, len(str(tmp_path / "out/subspace.html")))
    assert "more column" not in printed
    assert "latitude: smallest share" in printed
    page = (tmp_path / "out" / "subspace.html").read_text(encoding="utf-8")
    for told in (printed, page):
        assert "by generalised cross-validation" in " ".join(told.split())
    assert str(tmp_path / "out" / "subspace.png") in printed
    found = kept[1].subspace(sites=some[1:], protocol="study", random=2)
    _assert_same(gf.Subspace.open(tmp_path / "out"), found)
    assert main([*arguments, *some, "--out", str(tmp_path / "out")]) == 1
    assert "holds a search for dimensions already" in capsys.readouterr().err
    assert main([*arguments, *some, "--out", str(tmp_path / "out"), "--overwrite"]) == 0
    assert capsys.readouterr().out == printed
    assert main([*arguments, "--sites", "lm.layers.*"]) == 1
    assert "the run has no site 'lm.layers.*'" in capsys.readouterr().err
    # A run is replaced while nothing but its own files lies in its folder.
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 1
    assert "is a run's folder" in capsys.readouterr().err


# ------ its folder


@pytest.fixture(scope="module")
def small():
    """Two layers, one of which holds nothing."""
    x, y = rows(120, 12)
    noise = torch.randn(120, 12, generator=torch.Generator().manual_seed(0))
    fold = folds_of(120)
    grams = {
        "a.layers.0/cls/Where?": gram_of(noise, y, fold),
        "a.layers.1/cls": gram_of(x, y, fold),
    }
    return of_grams(grams, TARGETS, rankings=["forward", "coef"], random=2, fractions=FRACTIONS)


def _assert_same(one, other):
    for table in ("curves", "smallest", "stability"):
        pd.testing.assert_frame_equal(getattr(one, table), getattr(other, table), check_exact=True)
    for word in ("targets", "split", "study", "select", "draws", "train"):
        assert getattr(one, word) == getattr(other, word)
    assert {n: [*r] for n, r in one.ranks.items()} == {n: [*r] for n, r in other.ranks.items()}
    for name, by_ranking in one.ranks.items():
        for by, order in by_ranking.items():
            assert torch.equal(order, other.ranks[name][by])


def test_what_was_saved_opens_as_it_was(small, tmp_path):
    again = gf.Subspace.open(small.save(tmp_path / "out"))
    _assert_same(again, small)
    assert small.smallest["dims"].isna().any()  # of the layer that holds nothing
    assert str(again) == str(small)
    assert torch.equal(
        again.dims("a.layers.1", "latitude", 0.5), small.dims("a.layers.1", "latitude", 0.5)
    )
    of_nothing = of_grams(
        {"a/cls": gram_of(*rows(60, 6), folds_of(60))}, TARGETS, rankings=[], random=1
    )
    with pytest.raises(FileExistsError, match="holds a search for dimensions already"):
        of_nothing.save(tmp_path / "out")
    _assert_same(gf.Subspace.open(tmp_path / "out"), small)
    of_nothing.save(tmp_path / "out", overwrite=True)
    assert gf.Subspace.open(tmp_path / "out").smallest.empty


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("subspace.csv", b"site,pool\n", r"subspace.csv has 10 bytes instead of \d+"),
        ("subspace_smallest.csv", None, "No such file"),
        ("subspace.safetensors", b"\x08", "SafetensorError"),
        ("subspace.safetensors", b"other", "KeyError: 'geofast.subspace'"),
        ("subspace.safetensors", b"later", "it has format 9, and this geofast reads 1"),
    ],
)
def test_a_folder_that_cannot_be_read(small, tmp_path, file, content, message):
    store.write(small, tmp_path)
    path = tmp_path / file
    if content is None:
        path.unlink()
    elif content == b"other":
        save_file({"x": torch.zeros(1)}, path)
    elif content == b"later":
        save_file({}, path, metadata={"geofast.subspace": '{"format": 9}'})
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        gf.Subspace.open(tmp_path)
    assert "search again" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_of_something_else(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="holds no search for dimensions"):
            gf.Subspace.open(folder)


def test_the_page_and_its_picture(small, tmp_path):
    small.save(tmp_path)
    page = (tmp_path / "subspace.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page
    few = small.smallest[small.smallest["site"] == "a.layers.1"]
    row = few[few["target"] == "latitude"].sort_values("fraction", kind="stable").iloc[0]
    finding = report.finding(small)
    share = f"{100 * row['fraction']:.3g} %"
    said = f"latitude: {share} of the dimensions of a.layers.1 cls (95 % interval "
    assert finding.startswith(said)
    assert "95 % interval" in finding
    assert "range of 2 draws" in page
    assert finding in page
    figure = report.shares(small)
    curves = figure.axes[0]
    drawn = {line.get_label(): line.get_ydata() for line in curves.get_lines()}
    for by, words in (("forward", "forward selection"), ("random", "random dimensions")):
        table = small.curves[small.curves["site"] == "a.layers.1"]
        table = table[(table["target"] == "latitude") & (table["ranking"] == by)]
        np.testing.assert_array_equal(drawn[words], table["r2"])
    heat = figure.axes[1].get_images()[0].get_array()
    assert heat.shape == (2, len(FRACTIONS))
    table = small.curves[(small.curves["target"] == "latitude")]
    full = table[(table["ranking"] == "coef") & (table["fraction"] == 1)]["r2"]
    np.testing.assert_allclose(heat[:, -1], full)


def _with_smallest(found, fraction, low, high, random):
    """With this smallest share of every ranking and target, and random dimensions from `random`."""
    few = found.smallest.assign(r2=1.0, fraction=fraction, fraction_low=low, fraction_high=high)
    curves = found.curves.assign(r2=(found.curves["fraction"] >= random).astype(float))
    return replace(found, smallest=few, curves=curves)


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ((0.25, 0.1, 0.5, 0.9), "latitude: 25 % of the dimensions of a cls (95 % interval up to"),
        (
            (0.25, 0.25, 0.5, 0.9),
            "(95 % interval 25 to 50 %) keep 95 % of R², by |coef|; of random",
        ),
        ((0.25, 0.25, 0.5, 0.9), "of random dimensions 90 %; longitude"),
        ((0.25, 0.1, 0.9, 0.5), "of random dimensions 50 %, not clearly more; longitude"),
        ((0.1, 0.1, 0.1, 0.9), "latitude: at most 10 % of the dimensions"),
        ((0.5, 0.1, 0.5, 0.25), "latitude: random dimensions of a cls do as well as ranked ones"),
        ((0.1, 0.1, 0.1, 0.1), "as well as ranked ones: of both at most 10 % keep 95 % of R²"),
        ((1.0, 0.5, 1.0, 0.9), "latitude: no share tried of the dimensions of a cls but all keep"),
    ],
)
def test_the_finding_claims_no_more_than_random_dimensions_leave(shares, said):
    gram = gram_of(*rows(60, 20), folds_of(60))
    found = of_grams({"a/cls": gram}, TARGETS, rankings=["coef"], random=2, fractions=FRACTIONS)
    finding = report.finding(_with_smallest(found, *shares))
    assert said in finding
    assert ("95 % interval" in finding) == ("latitude: random" not in finding and shares[0] < 1)


def test_without_draws_the_finding_says_so():
    found = of_grams({"a/cls": gram_of(*rows(60, 20), folds_of(60))}, TARGETS, random=0)
    assert "no random dimensions were tried" in report.finding(found)


@pytest.mark.parametrize(("n", "few"), [(60, True), (90, False)])
def test_few_samples_are_told(n, few):
    found = of_grams({"a/cls": gram_of(*rows(n, 70), folds_of(n))}, TARGETS, rankings=["coef"])
    told = " ".join(str(found).split())
    assert ("Few samples: the smallest training part has 48 rows for 70 dim" in told) == few
    assert "range of 5 draws" in told
    assert "study" not in told


@pytest.mark.parametrize(("dim", "threads"), [(20, 1), (650, 3)])
def test_few_dimensions_take_one_thread_and_give_the_others_back(dim, threads, monkeypatch):
    seen = []

    def look(*_):
        seen.append(torch.get_num_threads())
        raise ValueError("seen")

    monkeypatch.setattr(measure, "_layer", look)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(ValueError, match="seen"):
            of_grams({"a/cls": gram_of(*rows(60, dim), folds_of(60))}, TARGETS)
        assert (seen, torch.get_num_threads()) == ([threads], 3)
    finally:
        torch.set_num_threads(before)


def test_why_the_runs_r2_may_differ(kept):
    assert "can differ a little" not in str(kept[0].subspace(rankings=["coef"], random=0))
    model = gf.load(tiny.dinov2(layers=2), prepare=pixels)
    run = gf.probe(model, painted(), storage="rows", select="loo", pool="cls")
    told = " ".join(str(run.subspace(rankings=["coef"], random=0)).split())
    assert "alpha is chosen here by generalised cross-validation" in told
    assert "in the run by leave-one-out" in told


@pytest.mark.parametrize("rankings", [[], ["coef"]])
def test_pages_of_a_single_layer_and_of_random_orders_alone(rankings, tmp_path):
    gram = gram_of(*rows(60, 6), folds_of(60))
    options = {"fractions": [1.0], "random": 1 - len(rankings)}
    of_grams({"a/cls": gram}, TARGETS, rankings=rankings, **options).save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {"subspace.png", "subspace.html"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fractions": [0.0, 0.5]}, "fractions must be above 0 and at most 1"),
        ({"fractions": [1.5]}, "fractions must be above 0 and at most 1"),
        ({"fractions": [float("nan")]}, "fractions must be above 0 and at most 1"),
        ({"fractions": []}, "fractions must be above 0 and at most 1"),
        ({"rankings": ["best"]}, "rankings must be some of"),
        ({"rankings": "coef"}, "rankings must be some of"),
        ({"rankings": [], "random": 0}, "nothing to measure"),
        ({"protocol": "paper"}, "protocol must be one of"),
        ({"random": -1}, "random must be a number of draws"),
        ({"sites": "lm.layers.3"}, "the run has no site 'lm.layers.3'; it has vision.embed"),
        ({"split": "blocks15"}, "the run has no split 'blocks15'; it has kfold"),
    ],
)
def test_bad_arguments(kept, options, message):
    with pytest.raises(ValueError, match=message):
        kept[0].subspace(**options)


def test_a_run_without_rows_or_statistics(kept):
    bare = gf.Run(kept[0].info, kept[0].layers, kept[0].samples, kept[0].probes)
    with pytest.raises(ValueError, match="keeps neither rows nor statistics"):
        bare.subspace()


def test_bad_statistics():
    x, y = rows(50, 5)
    with pytest.raises(ValueError, match=r"a/cls: held-out R² needs two folds or more; got 1"):
        of_grams({"a/cls": gf.Gram(5, 2).update(x, y)}, TARGETS)
    with pytest.raises(ValueError, match="statistics must be named site/pool"):
        of_grams({"a": gf.Gram(5, 2).update(x, y)}, TARGETS)
    with pytest.raises(ValueError, match="as many targets as there are names"):
        of_grams({"a/cls": gf.Gram(5, 2).update(x, y)}, ["latitude"])
    constant = y * torch.tensor([1.0, 0.0])
    with pytest.raises(ValueError, match="a/cls: target 1 is constant"):
        of_grams({"a/cls": gram_of(x, constant, folds_of(50))}, TARGETS)


def test_dims_that_are_not_there():
    gram = gram_of(*rows(50, 5), folds_of(50))
    found = of_grams({"a/cls": gram, "a/last": gram, "b/cls": gram}, TARGETS, random=0)
    assert found.dims("a", "latitude", 0.5, pool="last").shape == (2,)
    assert found.dims("b", "latitude", 0.01).shape == (1,)
    for arguments, message in [
        (("a", "latitude", 0.5), "several of site 'a'"),
        (("c", "latitude", 0.5), "no site 'c'"),
        (("b", "altitude", 0.5), "no target 'altitude'"),
        (("b", "latitude", 0), "share must be above 0"),
        (("b", "latitude", 1.1), "share must be above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            found.dims(*arguments)
    with pytest.raises(ValueError, match="ranking 'random' was not measured"):
        found.dims("b", "latitude", 0.5, ranking="random")
