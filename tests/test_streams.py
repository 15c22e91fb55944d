"""What is asked of CUDA beside the model's stream; a stand-in keeps the order of each stream."""

from __future__ import annotations

import weakref
from contextlib import contextmanager

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
    """Something that can be told to be gone."""


@pytest.fixture
def cuda(monkeypatch):
    made = Cuda()
    for name in ("current_stream", "set_stream", "device"):
        monkeypatch.setattr(torch.cuda, name, getattr(made, name))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return made


def on(index):
    return torch.device("cuda", index)


@pytest.mark.parametrize("index", [0, 1])
def test_work_beside_waits_for_what_came_before_and_is_joined(cuda, index):
    aside, (first, second) = Aside(), cuda.current
    model = cuda.current[index]
    for layer in range(3):
        model.work.append(f"layer {layer}")
        with aside.beside(on(index)):
            assert cuda.at == index
            side = cuda.current[index]
            assert side is not model
            cuda.launch(f"pool {layer}")
        assert (cuda.at, cuda.current) == (0, [first, second])
    assert side.work[::2] == [("wait", model, layer + 1) for layer in range(3)]
    assert side.work[1::2] == [f"pool {layer}" for layer in range(3)]
    aside.join()
    assert model.work == ["layer 0", "layer 1", "layer 2", ("wait", side, 6)]


def test_what_is_read_beside_is_kept_until_the_model_waits_for_it(cuda):
    """It waits a layer later, and for nothing that was run since."""
    aside, model = Aside(), cuda.current[0]
    layers = [Tensor() for _ in range(3)]
    alive = [weakref.ref(layer) for layer in layers]
    for number in range(3):
        model.work.append(f"layer {number}")
        layer = layers.pop(0)
        for part in ("pool", "each"):
            with aside.beside(on(0), layer):
                side = cuda.current[0]
                cuda.launch(f"{part} {number}")
        del layer
        assert [ref() is not None for ref in alive[: number + 1]] == [False] * number + [True]
    # Every part waits for the layer, so a layer takes four places there.
    waits = ["layer 0", "layer 1", ("wait", side, 4), "layer 2", ("wait", side, 8)]
    assert model.work == waits
    with aside.beside(on(0)):  # statistics, which read nothing that goes away
        cuda.launch("flush")
    assert model.work == [*waits, ("wait", side, 12)]
    assert alive[2]() is None
    model.work.append("layer 3")
    with aside.beside(on(0), Tensor()):
        pass
    assert model.work[-1] == "layer 3"
    aside.join()
    assert model.work[-1] == ("wait", side, len(side.work))
    aside.join()
    assert aside._sides[on(0)].read == ()


def test_every_device_has_a_stream_of_its_own(cuda):
    aside, met = Aside(), [set(), set()]
    for index in (0, 1, 0, 1):
        with aside.beside(on(index), Tensor()):
            met[index].add(cuda.current[index])
            cuda.launch("pool")
    assert [[stream.index for stream in some] for some in met] == [[0], [1]]
    aside.join()
    assert [stream.work[-1][0] for stream in cuda.current] == ["wait", "wait"]


def test_an_exception_leaves_the_streams_as_they_were(cuda):
    before = [*cuda.current]
    with pytest.raises(KeyError), Aside().beside(on(1), Tensor()):
        raise KeyError
    assert (cuda.at, cuda.current) == (0, before)


def test_on_the_cpu_there_is_nothing_beside(cuda):
    aside = Aside()
    with aside.beside(torch.device("cpu"), Tensor()):
        cuda.launch("pool")
    aside.join()
    assert cuda.current[0].work == ["pool"]


def test_what_a_pass_that_failed_left_is_let_go(cuda):
    aside, tensor = Aside(), Tensor()
    left, model = weakref.ref(tensor), cuda.current[0]
    with pytest.raises(KeyError), aside.beside(on(0), tensor):
        raise KeyError
    del tensor
    assert left() is not None
    aside.settle()
    assert left() is None
    waits = len(model.work)
    aside.settle()
    assert len(model.work) == waits == 1
