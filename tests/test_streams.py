"""What is asked of CUDA beside the model's stream; a stand-in keeps the order of each stream."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from geofast.streams import Aside


class Stream:
    """Work that was given to it, and of other streams what that had to wait for."""

    def __init__(self, device):
        self.index = device if isinstance(device, int) else device.index
        self.work = []

    def wait_event(self, event):
        self.work.append(("wait", *event.recorded))

    def wait_stream(self, other):
        self.work.append(("wait", other, len(other.work)))


class Event:
    def record(self, stream):
        self.recorded = stream, len(stream.work)


class Cuda:
    """Two GPUs, the first of them current."""

    def __init__(self):
        self.at, self.current = 0, [Stream(0), Stream(1)]

    def launch(self, what):
        self.current[self.at].work.append(what)

    def current_stream(self, device):
        return self.current[device if isinstance(device, int) else device.index]

    def set_stream(self, stream):
        self.at, self.current[stream.index] = stream.index, stream

    @contextmanager
    def device(self, index):
        before, self.at = self.at, index
        try:
            yield
        finally:
            self.at = before


class Tensor:
    def __init__(self, index):
        self.device, self.used_on = torch.device("cuda", index), []

    def record_stream(self, stream):
        self.used_on.append(stream)


@pytest.fixture
def cuda(monkeypatch):
    made = Cuda()
    for name in ("current_stream", "set_stream", "device"):
        monkeypatch.setattr(torch.cuda, name, getattr(made, name))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return made


@pytest.mark.parametrize("index", [0, 1])
def test_work_beside_waits_for_what_came_before_and_is_joined(cuda, index):
    aside, (first, second) = Aside(), cuda.current
    model = cuda.current[index]
    tensors = [Tensor(index), Tensor(index)]
    for layer in range(3):
        model.work.append(f"layer {layer}")
        with aside.beside(*tensors):
            assert cuda.at == index
            cuda.launch(f"pool {layer}")
        assert (cuda.at, cuda.current) == (0, [first, second])
    (side,) = set(tensors[0].used_on)
    assert [t.used_on for t in tensors] == [[side] * 3] * 2
    assert side is not model
    assert side.work[::2] == [("wait", model, layer + 1) for layer in range(3)]
    assert side.work[1::2] == [f"pool {layer}" for layer in range(3)]
    aside.join()
    assert model.work == ["layer 0", "layer 1", "layer 2", ("wait", side, 6)]


def test_every_device_has_a_stream_of_its_own(cuda):
    aside, tensors = Aside(), [Tensor(0), Tensor(1)]
    for tensor in tensors * 2:
        with aside.beside(tensor):
            cuda.launch("pool")
    streams = [set(tensor.used_on) for tensor in tensors]
    assert [[s.index for s in some] for some in streams] == [[0], [1]]
    aside.join()
    assert [stream.work[-1][0] for stream in cuda.current] == ["wait", "wait"]


def test_an_exception_leaves_the_streams_as_they_were(cuda):
    before = [*cuda.current]
    with pytest.raises(KeyError), Aside().beside(Tensor(1)):
        raise KeyError
    assert (cuda.at, cuda.current) == (0, before)


def test_on_the_cpu_there_is_nothing_beside(cuda):
    aside = Aside()
    with aside.beside(SimpleNamespace(device=torch.device("cpu"))):
        cuda.launch("pool")
    aside.join()
    assert cuda.current[0].work == ["pool"]
