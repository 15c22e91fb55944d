import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeCV as SklearnRidgeCV
from sklearn.model_selection import KFold
from sklearn.utils.estimator_checks import parametrize_with_checks
from synthetic import rows

import geofast as gf


@parametrize_with_checks([gf.RidgeCV()])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


@pytest.mark.parametrize("cv", [None, 5, KFold(4, shuffle=True, random_state=1)])
@pytest.mark.parametrize("k", [1, 3])
def test_as_scikit_learns(cv, k):
    x, y = rows(k=k)
    x = x.double().numpy()
    y = y.numpy()[:, 0] if k == 1 else y.numpy()
    expected = SklearnRidgeCV(
        alphas=gf.ALPHAS, cv=cv, scoring="neg_mean_squared_error" if cv else None
    ).fit(x, y)
    found = gf.RidgeCV(cv=cv).fit(x, y)
    assert found.alpha_ == pytest.approx(expected.alpha_)
    assert found.coef_.shape == expected.coef_.shape
    np.testing.assert_allclose(found.coef_, expected.coef_, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(found.intercept_, expected.intercept_, rtol=1e-6)
    np.testing.assert_allclose(found.predict(x), expected.predict(x), rtol=1e-6, atol=1e-6)


def test_an_alpha_for_every_target():
    x, y = rows(k=3)
    y[:, 2] = torch.randn(len(y), generator=torch.Generator().manual_seed(0))
    expected = SklearnRidgeCV(alphas=gf.ALPHAS, alpha_per_target=True).fit(
        x.double().numpy(), y.numpy()
    )
    found = gf.RidgeCV(alpha_per_target=True).fit(x, y)
    assert len(set(found.alpha_.tolist())) > 1
    np.testing.assert_allclose(found.alpha_, expected.alpha_)
    np.testing.assert_allclose(found.coef_, expected.coef_, rtol=1e-5, atol=1e-8)


def test_torch_in_torch_out():
    x, y = rows()
    model = gf.RidgeCV().fit(x.bfloat16(), y)
    assert isinstance(model.coef_, torch.Tensor)
    assert isinstance(model.predict(x.bfloat16()), torch.Tensor)
    assert isinstance(gf.RidgeCV().fit(x.numpy(), y.numpy()).predict(x.numpy()), np.ndarray)


def test_folds_must_partition():
    from sklearn.model_selection import ShuffleSplit

    x, y = rows()
    with pytest.raises(ValueError, match="must partition the samples"):
        gf.RidgeCV(cv=ShuffleSplit(3)).fit(x, y)
