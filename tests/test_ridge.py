import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.linear_model import RidgeCV as SklearnRidgeCV
from sklearn.metrics import r2_score
from sklearn.model_selection import KFold
from synthetic import KINDS, rows

import geofast as gf
from geofast.ridge import fold_errors, training


@pytest.fixture(params=["few features", "many features"])
def route(request, monkeypatch):
    """Both ways of solving, whatever the number of features of a test."""
    if request.param == "many features":
        monkeypatch.setattr(training, "_SMALL", 0)


def folds_of(n, folds=5, seed=42):
    fold = torch.empty(n, dtype=torch.int64)
    for f, (_, test) in enumerate(KFold(folds, shuffle=True, random_state=seed).split(np.zeros(n))):
        fold[test] = f
    return fold


def study(x, y, fold):
    """The study's probe: scikit-learn's RidgeCV inside every fold, in float64."""
    x, y, fold = x.double().numpy(), y.numpy(), fold.numpy()
    alphas, scores, held = [], [], np.empty_like(y)
    for f in range(fold.max() + 1):
        train, test = fold != f, fold == f
        model = SklearnRidgeCV(alphas=gf.ALPHAS).fit(x[train], y[train])
        held[test] = model.predict(x[test]).reshape(test.sum(), -1)
        alphas.append(model.alpha_)
        scores.append(r2_score(y[test], held[test], multioutput="raw_values"))
    return np.array(alphas), np.array(scores), held


def assert_same(found, expected, tolerance=1e-6):
    alphas, scores, held = expected
    np.testing.assert_allclose(found.alpha.numpy(), alphas, rtol=1e-9)
    np.testing.assert_allclose(found.r2.numpy(), scores, atol=tolerance)
    if found.predictions is not None:
        spread = held.std(0)
        np.testing.assert_allclose(
            found.predictions.numpy() / spread, held / spread, atol=tolerance
        )


@pytest.mark.parametrize("kind", KINDS)
def test_leave_one_out_is_scikit_learns(route, kind):
    x, y = rows(kind=kind)
    fold = folds_of(len(x))
    assert_same(gf.cross_validate(x, y, fold), study(x, y, fold))


def test_rows_may_be_numpys(route):
    x, y = rows()
    fold = folds_of(len(x))
    found = gf.cross_validate(*(torch.as_tensor(one).numpy() for one in (x, y, fold)))
    torch.testing.assert_close(found.r2, gf.cross_validate(x, y, fold).r2, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "d", "scale"), [(500, 48, 300), (150, 118, 30), (150, 118, 300)])
def test_badly_scaled_rows_and_as_many_rows_as_features(route, kind, n, d, scale):
    x, y = rows(n, d, kind=kind, seed=5)
    x, fold = scale * x, torch.arange(n) % 5
    assert_same(gf.cross_validate(x, y, fold), study(x, y, fold))


def many_scales(seed):
    """Rows whose features span six decades, and targets that need small ones: several minima."""
    r = np.random.default_rng(seed)
    n, d = (100, 200)[seed % 2], 40
    scale = 10 ** r.uniform(-3, 3, d)
    x = (r.standard_normal((n, d)) * scale).astype(np.float32)
    weight = r.standard_normal(d) * (r.random(d) < 0.3) / scale ** r.uniform(0, 1.2)
    y = (x @ weight)[:, None]
    y = y / y.std() + r.choice([0.1, 1, 5]) * r.standard_normal((n, 1))
    return torch.from_numpy(x), torch.from_numpy(y)


@pytest.mark.parametrize("n", [300, 40])
def test_the_smallest_alpha_where_features_do_not_vary(route, n):
    """The CLS token of an embedding is the same for every image."""
    x, y = rows(n, 60)
    x, fold = x[:1].repeat(n, 1), folds_of(n)
    for select in ("loo", "gcv", "folds"):
        found = gf.cross_validate(x, y, fold, select=select)
        assert float(found.r2.max()) < 1e-9
        if select != "gcv":  # whose estimate of the trace is noise to it
            assert found.alpha.tolist() == [gf.ALPHAS[0]] * 5


def test_the_least_of_several_minima(route):
    """Leave-one-out is scikit-learn's whichever way the search starts."""
    several = 0
    for seed in range(40):
        x, y = many_scales(seed)
        curve = leave_one_out_curve(x, y)
        inside = (curve[1:-1] < curve[:-2]) & (curve[1:-1] < curve[2:])
        several += inside.sum() + (curve[0] < curve[1]) + (curve[-1] < curve[-2]) > 1
        model = SklearnRidgeCV(alphas=gf.ALPHAS).fit(x.double().numpy(), y.numpy())
        np.testing.assert_allclose(gf.fit(x, y).alpha[0], model.alpha_, rtol=1e-9)
    assert several >= 3  # or this tests nothing


def leave_one_out_curve(x, y):
    x, y = x.double().numpy(), y.numpy()
    u, s, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    about = y - y.mean(0)
    shrink = s**2 / (s**2 + np.array(gf.ALPHAS)[:, None])
    error = about - np.einsum("nd,ad,dk->ank", u, shrink, u.T @ about)
    free = 1 - 1 / len(x) - shrink @ (u**2).T
    return ((error / free[..., None]) ** 2).mean((1, 2))


@pytest.mark.parametrize("k", [1, 2, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_and_number_of_targets(route, k, dtype):
    x, y = rows(k=k, seed=k)
    x, fold = x.to(dtype), folds_of(len(x))
    assert_same(gf.cross_validate(x, y, fold), study(x, y, fold))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(60, 100), (100, 90), (12, 300)])
def test_fewer_rows_than_features(kind, shape):
    x, y = rows(*shape, kind=kind)
    fold = folds_of(len(x))
    assert_same(gf.cross_validate(x, y, fold), study(x, y, fold))


def test_a_held_out_row_far_out():
    """What rounding leaves of the sum of dual coefficients, it would multiply by its square."""
    x, y = rows(60, 90)
    x[0] *= 1e5
    fold = folds_of(60)
    found = gf.cross_validate(x, y, fold)
    assert "X X'" in found.method
    held = study(x, y, fold)[2]
    np.testing.assert_allclose(found.predictions[0], held[0], rtol=1e-6)


def test_fewer_rows_than_features_of_large_scale():
    """From penalties next to nothing, where hardly anything is free, to those that noise needs."""
    x, _ = rows(60, 90)
    y = torch.from_numpy(np.random.default_rng(0).standard_normal((60, 2)))
    x, fold, alphas = x * 1e6, folds_of(60), np.logspace(-1, 14, 16)
    found = gf.cross_validate(x, y, fold, alphas)
    expected = [
        SklearnRidgeCV(alphas=alphas).fit(x[fold != f].double(), y[fold != f]).alpha_
        for f in range(5)
    ]
    np.testing.assert_allclose(found.alpha, expected)


def test_rows_of_some_parts_alone_are_fewer_than_features():
    x, y = rows(300, 90)
    fold = torch.zeros(300, dtype=torch.int64)
    fold[-60:] = torch.arange(60) % 4 + 1
    found = gf.cross_validate(x, y, fold)
    assert "X X'" not in found.method
    assert_same(found, study(x, y, fold))


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_rows_than_features_through_the_gram(kind):
    x, y = rows(100, 90, kind=kind)
    fold = folds_of(len(x))
    through_rows = gf.cross_validate(x, y, fold, select="gcv", inner=True)
    assert "X X'" in through_rows.method
    found = gf.solve(gf.Gram(90, 2, 5).update(x, y, fold), inner=True)
    assert "Cholesky" in found.method
    torch.testing.assert_close(found.alpha, through_rows.alpha)
    torch.testing.assert_close(found.r2, through_rows.r2, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.inner_r2, through_rows.inner_r2, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_wider_rows(kind):
    """The factors in float32 and the Lanczos steps, at a width that takes them unasked."""
    x, y = rows(1000, 320, kind=kind, seed=3)
    fold = folds_of(len(x))
    found = gf.cross_validate(x, y, fold)
    # Five rows of 1000 in four features leave float32 no digits for the rest: it falls back.
    assert f"Cholesky in {'float64' if kind == 'massive_rows' else 'float32'}" in found.method
    assert_same(found, study(x, y, fold))


def gcv(x, y, alphas):
    """Golub's GCV in float64 from singular values."""
    x, y = x.double().numpy(), y.numpy()
    x, y, n = x - x.mean(0), y - y.mean(0), len(x)
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    uy = u.T @ y
    curve = []
    for alpha in alphas:
        shrink = s**2 / (s**2 + alpha)
        rss = ((y - u @ (shrink[:, None] * uy)) ** 2).sum()
        curve.append(n * rss / (n - 1 - shrink.sum()) ** 2)
    return np.array(curve)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_gcv_chooses_golubs_alpha(route, kind, seed):
    x, y = rows(600, 90, kind=kind, seed=seed)
    fold = folds_of(len(x))
    expected = [gf.ALPHAS[gcv(x[fold != f], y[fold != f], gf.ALPHAS).argmin()] for f in range(5)]
    found = gf.cross_validate(x, y, fold, select="gcv")
    np.testing.assert_allclose(found.alpha.numpy(), expected, rtol=1e-9)
    gram = gf.Gram(x.shape[1], 2, 5).update(x, y, fold)
    np.testing.assert_allclose(gf.solve(gram).alpha.numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("n", [100, 150, 260, 400])
def test_gcv_of_hardly_more_rows_than_features_or_fewer(n):
    """At the least alphas n - 1 - df is next to nothing, and rounding must not choose them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 288, generator=generator) * torch.logspace(2, 0, 288)
    y = (x[:, :2] + 200 * torch.randn(n, 2, generator=generator)).double()
    fold = folds_of(n)
    expected = [gf.ALPHAS[gcv(x[fold != f], y[fold != f], gf.ALPHAS).argmin()] for f in range(5)]
    found = gf.solve(gf.Gram(288, 2, 5).update(x, y, fold))
    np.testing.assert_allclose(found.alpha.numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_give_what_rows_give(route, kind):
    x, y = rows(kind=kind)
    fold = folds_of(len(x))
    from_rows = gf.cross_validate(x, y, fold, select="gcv")
    found = gf.solve(gf.Gram(x.shape[1], 2, 5).update(x, y, fold))
    torch.testing.assert_close(found.alpha, from_rows.alpha)
    torch.testing.assert_close(found.r2, from_rows.r2, atol=1e-8, rtol=0)
    torch.testing.assert_close(found.mse, from_rows.mse, atol=0, rtol=1e-7)
    scale = from_rows.coef.abs().amax(1, keepdim=True)
    torch.testing.assert_close(found.coef / scale, from_rows.coef / scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(300, 20), (40, 60)])
def test_inner_folds_choose_what_plain_refits_choose(shape):
    x, y = rows(*shape)
    fold = folds_of(len(x), 4)
    found = gf.cross_validate(x, y, fold, select="folds", inner=True)
    for f in range(4):
        errors, scores = np.zeros(12), np.zeros((12, 2))
        for g in set(range(4)) - {f}:
            train, test = (fold != f) & (fold != g), fold == g
            for a, alpha in enumerate(gf.ALPHAS):
                guess = Ridge(alpha).fit(x[train].double(), y[train]).predict(x[test].double())
                errors[a] += ((y[test].numpy() - guess) ** 2).mean()
                scores[a] += r2_score(y[test], guess, multioutput="raw_values") / 3
        assert found.alpha[f] == pytest.approx(gf.ALPHAS[errors.argmin()])
        np.testing.assert_allclose(found.inner_r2[f], scores[errors.argmin()], atol=1e-6)


def test_inner_scores_do_not_need_inner_selection():
    x, y = rows(300, 20)
    fold = folds_of(len(x), 4)
    by_folds = gf.cross_validate(x, y, fold, gf.ALPHAS[3:4], select="folds", inner=True)
    by_loo = gf.cross_validate(x, y, fold, gf.ALPHAS[3:4], select="loo", inner=True)
    torch.testing.assert_close(by_loo.inner_r2, by_folds.inner_r2, atol=1e-10, rtol=0)
    assert gf.cross_validate(x, y, fold).inner_r2 is None


@pytest.mark.parametrize("shape", [(300, 20), (40, 60)])
@pytest.mark.parametrize("kind", ["plain", "large_means"])
def test_fit_is_scikit_learns(route, shape, kind):
    x, y = rows(*shape, kind=kind)
    model = SklearnRidgeCV(alphas=gf.ALPHAS).fit(x.double(), y)
    found = gf.fit(x, y)
    assert float(found.alpha[0]) == pytest.approx(model.alpha_)
    np.testing.assert_allclose(found.coef[0].T, model.coef_, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(found.intercept[0], model.intercept_, rtol=1e-6, atol=1e-5)
    assert found.r2 is None


def test_a_gram_of_one_cell_is_fitted_whole():
    x, y = rows()
    found = gf.solve(gf.Gram(x.shape[1], 2).update(x, y))
    expected = Ridge(float(found.alpha[0])).fit(x.double(), y)
    np.testing.assert_allclose(found.coef[0].T, expected.coef_, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(found.intercept[0], expected.intercept_, rtol=1e-7)
    assert found.r2 is None


@pytest.mark.parametrize("shape", [(300, 20), (40, 60)])
def test_fold_errors(shape):
    x, y = rows(*shape)
    fold = folds_of(len(x), 3)
    found = fold_errors(x, y, fold, gf.ALPHAS[::3])
    for f in range(3):
        for a, alpha in enumerate(gf.ALPHAS[::3]):
            train, test = fold != f, fold == f
            guess = Ridge(alpha).fit(x[train].double(), y[train]).predict(x[test].double())
            assert float(found[f, a]) == pytest.approx(
                ((y[test].numpy() - guess) ** 2).mean(), rel=1e-7
            )


def test_noise_is_not_read():
    """The opposite: with no signal, nothing is found."""
    x, y = rows(500, 30)
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    assert float(gf.cross_validate(x, y, folds_of(500)).r2.mean()) < 0.02


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y, f: (x, y * torch.tensor([1.0, 0.0]), f, gf.ALPHAS), "target 1 is constant"),
        (lambda x, y, f: (x, y, f, [0.1, 0.0]), "alphas must be positive"),
        (lambda x, y, f: (x, y, f, [0.1, torch.nan]), "alphas must be positive"),
        (lambda x, y, f: (x, y, torch.zeros_like(f), gf.ALPHAS), "every row is in the same fold"),
        (lambda x, y, f: (x, y, f + (f > 1), gf.ALPHAS), "fold 2 has no rows"),
        (lambda x, y, f: (x, y, f - 1, gf.ALPHAS), "fold must be int64"),
        (lambda x, y, f: (x, y, f[1:], gf.ALPHAS), "fold must be int64"),
        (lambda x, y, f: (x, y, f.int(), gf.ALPHAS), "fold must be int64"),
        (lambda x, y, f: (x, y[:, 0], f, gf.ALPHAS), "targets .n, k.; got"),
        (lambda x, y, f: (x, y[1:], f, gf.ALPHAS), "targets .n, k.; got"),
        (lambda x, y, f: (with_one(x, torch.inf), y, f, gf.ALPHAS), "feature 5 of row 7 is inf"),
        (lambda x, y, f: (x, with_one(y, torch.nan), f, gf.ALPHAS), "target 1 of row 7 is nan"),
    ],
)
@pytest.mark.parametrize("shape", [(300, 20), (40, 60)])
def test_bad_input(change, message, shape):
    x, y = rows(*shape)
    with pytest.raises(ValueError, match=message):
        gf.cross_validate(*change(x, y, folds_of(len(x))))


def with_one(table, value):
    table = table.clone()
    table[7, min(5, table.shape[1] - 1)] = value
    return table


@pytest.mark.parametrize("shape", [(300, 20), (40, 60)])
def test_unknown_selections_and_two_inner_folds(shape):
    x, y = rows(*shape)
    with pytest.raises(ValueError, match="select must be one of"):
        gf.cross_validate(x, y, folds_of(len(x)), select="cv")
    with pytest.raises(ValueError, match="three folds or more"):
        gf.cross_validate(x, y, folds_of(len(x), 2), select="folds")


def test_a_bad_gram_is_refused():
    x, y = rows()
    fold = folds_of(len(x))
    with pytest.raises(ValueError, match="column 5 of the Gram is not finite"):
        gf.solve(gf.Gram(x.shape[1], 2, 5).update(with_one(x, torch.nan), y, fold))
    with pytest.raises(ValueError, match="fold 5 has no rows"):
        gf.solve(gf.Gram(x.shape[1], 2, 6).update(x, y, fold))


@pytest.mark.parametrize("shape", [(300, 20), (40, 60)])
def test_a_target_that_is_constant_in_a_held_out_fold_has_no_r2(shape):
    x, y = rows(*shape)
    fold = folds_of(len(x))
    y[fold == 2, 0] = 0.1  # its mean is not 0.1 exactly
    found = gf.cross_validate(x, y, fold)
    assert found.r2.isnan().nonzero().tolist() == [[2, 0]]
    if shape[0] > shape[1]:
        gram = gf.Gram(x.shape[1], 2, 5).update(x, y, fold)
        assert gf.solve(gram).r2.isnan().nonzero().tolist() == [[2, 0]]


def test_statistics_cannot_leave_one_out_nor_two_folds_be_inner():
    x, y = rows()
    gram = gf.Gram(x.shape[1], 2, 2).update(x, y, folds_of(len(x), 2))
    with pytest.raises(ValueError, match="three folds or more"):
        gf.solve(gram, select="folds")
    with pytest.raises(ValueError, match="empty"):
        gf.solve(gf.Gram(3, 1))
