"""The compiled CPU core: every function checks its tensors and writes in place."""

from torch import Tensor

__version__: str

def detected_isa() -> str: ...
def large_pages(x: Tensor) -> None: ...
def pool(
    x: Tensor, roles: Tensor, jobs: list[tuple[str, int, Tensor]], *, isa: str | None = None
) -> bool: ...
def project(
    x: Tensor,
    shift: Tensor,
    w: Tensor,
    out: Tensor,
    *,
    rows: Tensor | None = None,
    isa: str | None = None,
) -> None: ...
def project_t(
    x: Tensor,
    shift: Tensor,
    r: Tensor,
    out: Tensor,
    *,
    rows: Tensor | None = None,
    isa: str | None = None,
) -> None: ...
def gram(
    x: Tensor,
    shift: Tensor,
    z: Tensor,
    order: Tensor,
    offsets: Tensor,
    out: Tensor,
    *,
    products: str = "float64",
    isa: str | None = None,
) -> None: ...
def training_matrix(
    total: Tensor,
    held: Tensor,
    sets: Tensor,
    alpha: Tensor,
    out: Tensor,
    *,
    isa: str | None = None,
) -> None: ...
def cholesky(a: Tensor, info: Tensor, *, isa: str | None = None) -> None: ...
def solve_lower(l: Tensor, b: Tensor, transpose: bool, *, isa: str | None = None) -> None: ...
def inverse_trace(l: Tensor, out: Tensor, *, isa: str | None = None) -> None: ...
def leverage(
    l: Tensor,
    x: Tensor,
    center: Tensor,
    rows: Tensor,
    out: Tensor,
    *,
    isa: str | None = None,
) -> None: ...
