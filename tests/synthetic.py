"""Rows that look like a model's, hard on purpose."""

import numpy as np
import torch


def rows(n=400, d=48, k=2, *, kind="plain", seed=0):
    """Float32 rows [n, d] and targets [n, k] with a linear part of the signal.

    kind: plain, collinear, massive_dims, massive_rows, large_means, steep.
    """
    r = np.random.default_rng(seed)
    scale = np.arange(1, d + 1) ** -(2.0 if kind == "steep" else 0.7)
    x = r.standard_normal((n, d)) * scale @ np.linalg.qr(r.standard_normal((d, d)))[0]
    y = x @ r.standard_normal((d, k)) + 0.7 * r.standard_normal((n, k)) * x.std()
    y = y / y.std(0) * np.resize([20.0, 60.0], k) + np.resize([30.0, 10.0], k)
    big = r.choice(d, min(4, d), replace=False)
    if kind == "collinear":
        x[:, d // 2 :] = x[:, : d - d // 2] + 1e-4 * r.standard_normal((n, d - d // 2))
    elif kind == "massive_dims":
        x[:, big] = x[:, big] * 1000 + np.resize([3000, -1500, 1000, 500], len(big))
    elif kind == "massive_rows":
        x[np.ix_(r.choice(n, 5, replace=False), big)] += 1000
    elif kind == "large_means":
        x += 50 * r.standard_normal(d)
    return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y)


KINDS = ("plain", "collinear", "massive_dims", "massive_rows", "large_means", "steep")
