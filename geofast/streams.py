"""Work beside the model's own on a GPU: probing a layer while the next one runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

_NOTHING = nullcontext()


class Aside:
    """A stream beside the current one on every GPU that is met; on the CPU nothing of the kind.

    Fork and join are events alone, so that the host waits for nothing and a CUDA graph can be
    captured around both.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def beside(self, *read: torch.Tensor) -> AbstractContextManager[None]:
        """Run what is inside after all that the device of `read` was given so far.

        The tensors that are read there must be named: the memory of others may be given away
        before it is their turn.
        """
        return self._fork(read) if read[0].device.type == "cuda" else _NOTHING

    @contextmanager
    def _fork(self, read: tuple[torch.Tensor, ...]) -> Iterator[None]:
        device = read[0].device
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        side = self._streams[device]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            yield
        for tensor in read:
            tensor.record_stream(side)

    def join(self) -> None:
        """Have whatever comes next on each GPU wait for what was run here."""
        for device, side in self._streams.items():
            torch.cuda.current_stream(device).wait_stream(side)
