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
        self._sides: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.Event]] = {}

    def beside(self, *read: torch.Tensor) -> AbstractContextManager[None]:
        """Run what is inside after all that the device of `read` was given so far.

        The tensors that are read there must be named: the memory of others may be given away
        before it is their turn.
        """
        return self._fork(read) if read[0].device.type == "cuda" else _NOTHING

    @contextmanager
    def _fork(self, read: tuple[torch.Tensor, ...]) -> Iterator[None]:
        # Every hook comes here. With Stream.wait_stream and torch.cuda.stream, which make an event
        # each time and look for the device again and again, it would take the host twice as long.
        device = read[0].device
        if device not in self._sides:
            self._sides[device] = torch.cuda.Stream(device), torch.cuda.Event()
        side, event = self._sides[device]
        with torch.cuda.device(device.index):
            current = torch.cuda.current_stream(device.index)
            event.record(current)
            side.wait_event(event)
            torch.cuda.set_stream(side)
            try:
                yield
            finally:
                torch.cuda.set_stream(current)
        for tensor in read:
            tensor.record_stream(side)

    def join(self) -> None:
        """Have whatever comes next on each GPU wait for what was run here."""
        for device, (side, event) in self._sides.items():
            event.record(side)
            torch.cuda.current_stream(device.index).wait_event(event)
