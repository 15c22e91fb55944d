"""Inputs of the benchmarks: rows like a model's, and the folds of the study."""

import numpy as np
import torch
from sklearn.model_selection import KFold


def targets(n, k=2):
    """Latitude- and longitude-like targets [n, k] and the 64 directions that explain them."""
    r = np.random.default_rng(12345)
    latent = r.standard_normal((n, 64))
    y = latent @ (r.standard_normal((64, k)) / np.sqrt(np.arange(1, 65))[:, None])
    y = y / y.std(0) * np.resize([15.0, 40.0], k)
    y += r.standard_normal((n, k)) * np.resize([8.0, 25.0], k) + np.resize([30.0, 10.0], k)
    return torch.from_numpy(y), latent


def layer(n, d, seed):
    """One layer's rows, float32 [n, d]: power-law spectrum, large means, 4 massive dimensions."""
    r = np.random.default_rng(seed)
    scale = 1.0 / np.arange(1, d + 1)
    x = r.standard_normal((n, d), dtype=np.float32)
    place = r.choice(min(d, 256), 64, replace=False)
    x[:, place] = 0.8 * targets(n)[1] + 0.6 * x[:, place]
    x *= (0.5 * scale / np.sqrt((scale**2).mean())).astype(np.float32)
    for start in range(0, d - d % 64, 64):
        turn = np.linalg.qr(r.standard_normal((64, 64)))[0].astype(np.float32)
        x[:, start : start + 64] = x[:, start : start + 64] @ turn
    x = x[:, r.permutation(d)] + 0.5 * r.standard_normal(d).astype(np.float32)
    big = r.choice(d, 4, replace=False)
    x[:, big] += np.array([300, -150, 100, 50], np.float32)
    x[:, big] += np.array([30, 20, 10, 5], np.float32) * r.standard_normal((n, 4), dtype=np.float32)
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))


def study_folds(n):
    """Fold of every sample: KFold(5, shuffle=True, random_state=42)."""
    fold = torch.empty(n, dtype=torch.int64)
    for f, (_, test) in enumerate(KFold(5, shuffle=True, random_state=42).split(np.zeros(n))):
        fold[test] = f
    return fold
