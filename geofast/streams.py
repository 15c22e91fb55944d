"""Work beside the model's own on a GPU: probing a layer while the next one runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

_NOTHING = nullcontext()


def capturing(device: torch.device) -> bool:
    """Whether what `device` is given goes into a CUDA graph."""
    made = device.type == "cuda" and torch.cuda.is_initialized()
    return made and torch.cuda.is_current_stream_capturing()


class Aside:
    """A stream beside the current one on every GPU that is met; on the CPU nothing of the kind.

    Fork and join are events alone, so that the host waits for nothing and a CUDA graph can be
    captured around both.
    """

    def __init__(self) -> None:
        self._sides: dict[torch.device, _Side] = {}

    def beside(self, device: torch.device, *read: torch.Tensor) -> AbstractContextManager[None]:
        """Run what is inside after all that `device` was given so far.

        Tensors that are read there must be named, unless they are kept until the next `join`: the
        memory of others may be given away before it is their turn. They are kept until work is run
        here again, and what comes after that on the current stream waits until they were read. So
        no more than one layer's are kept, in a CUDA graph too.
        """
        return self._fork(device, read) if device.type == "cuda" else _NOTHING

    @contextmanager
    def _fork(self, device: torch.device, read: tuple[torch.Tensor, ...]) -> Iterator[None]:
        # Every hook comes here. With Stream.wait_stream and torch.cuda.stream, which make an event
        # each time and look for the device again and again, it would take the host twice as long.
        side = self._sides.get(device) or self._sides.setdefault(device, _Side(device))
        with torch.cuda.device(device.index):
            current = torch.cuda.current_stream(device.index)
            if side.read and not (read and read[0] is side.read[0]):  # more of a layer may come
                read_before, side.read = side.read, ()
                current.wait_event(side.done)
                del read_before  # not before the wait
            side.forked.record(current)
            side.stream.wait_event(side.forked)
            torch.cuda.set_stream(side.stream)
            try:
                yield
            finally:
                torch.cuda.set_stream(current)
                side.done.record(side.stream)
                side.read += read

    def settle(self) -> None:
        """Join if something is kept: what a pass that failed left."""
        if any(side.read for side in self._sides.values()):
            self.join()

    def join(self) -> None:
        """Have whatever comes next on each GPU wait for what was run here."""
        for device, side in self._sides.items():
            side.done.record(side.stream)
            torch.cuda.current_stream(device.index).wait_event(side.done)
            side.read = ()

    def wait(self) -> None:
        """Have the host wait for what was run here."""
        for side in self._sides.values():
            side.stream.synchronize()


class _Side:
    """The stream of one GPU, and what it is reading."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.forked, self.done = torch.cuda.Event(), torch.cuda.Event()
        self.read: tuple[torch.Tensor, ...] = ()
