"""The compiled CPU core. Every function checks dtype, shape and device of its tensors and writes in place."""

from torch import Tensor

__version__: str

def detected_isa() -> str: ...
def pool(
    x: Tensor, roles: Tensor, jobs: list[tuple[str, int, Tensor]], *, isa: str | None = None
) -> None: ...
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
