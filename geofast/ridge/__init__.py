"""Ridge regression of every fold and alpha at once, from sufficient statistics and rows.

Notation, for one training set: A = X'X and b = X'Y about the training mean, n rows, d features.
The penalty alpha is chosen among `alphas`, one for all targets together, by

- `gcv`: Golub's generalised cross-validation, n RSS / (n - 1 - df)^2 (Golub, Heath and Wahba,
  Technometrics 1979), from the statistics alone;
- `loo`: exact leave-one-out errors, what scikit-learn's RidgeCV minimises; needs the rows;
- `folds`: inner folds, from the statistics alone; the right one for grouped and spatial folds.

Few features are solved in float64, by eigenvectors for the GCV curve, and so are hardly more rows
than features, where a GPU takes a factor of every alpha instead. Otherwise one Cholesky factor of
A + pI in float32 gives the whole curve of a training set: Lanczos steps on (A + pI)^-1 are Gauss
quadrature for b'(A + aI)^-1 b, for its derivative and, started from random signs, for the trace in
df (Golub and Meurant, Matrices, Moments and Quadrature, 2010). The pole p moves to the minimum of
its own curve, where the quadrature is exact, so the factor that is left over is the one that the
solution needs; what the errors of the estimate leave open, exact traces decide. From that minimum
leave-one-out searches all alphas by branch and bound (`loo`, and `loo_of_all` for all sets at
once). Solutions are refined against the float64 residual of the rows themselves (or of the float64
statistics), so their error does not depend on the factor's precision; where float32 fails, float64
is used and the result says so.

M training sets are treated at once: those of all folds and, on a GPU, of many layers. Its factors
are float64 where its tensor cores multiply in it. With fewer rows than features (`wide`) X X' takes
the place of X'X. Whatever is large stays on the device of the rows or the statistics. What decides
(alphas, curves, which sets are done) is on the CPU, so the host waits for the device a few times,
however many layers there are; solutions come back on the CPU.
"""

from .solution import ALPHAS, Select, Solution
from .solve import (
    cross_validate,
    cross_validate_many,
    fit,
    fit_many,
    fold_errors,
    solve,
    solve_many,
)

__all__ = [
    "ALPHAS",
    "Select",
    "Solution",
    "cross_validate",
    "cross_validate_many",
    "fit",
    "fit_many",
    "fold_errors",
    "solve",
    "solve_many",
]
