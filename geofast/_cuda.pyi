from collections.abc import Sequence

from torch import Tensor

architectures: str

def unavailable(device: int | None = None) -> str | None: ...
def gram(
    xs: Sequence[Tensor],
    shifts: Sequence[Tensor],
    z: Tensor,
    order: Tensor,
    offsets: Tensor,
    outs: Sequence[Tensor],
) -> None: ...
