"""The stand-in for a GPU refuses what a GPU refuses, allows what it allows, and sees waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from pretend import Far, Pretend

from geofast import _core


@pytest.fixture
def gpu() -> Iterator[Pretend]:
    with Pretend() as gpu:
        yield gpu


def there(*shape: int) -> torch.Tensor:
    return torch.arange(1.0, 1.0 + torch.Size(shape).numel()).view(shape).to(Pretend.device)


def test_tensors_say_that_they_are_on_the_device_and_have_numbers(gpu: Pretend) -> None:
    made = [
        there(2, 3),
        torch.randn(2, 3, device=gpu.device),
        torch.tensor([[1.0]], device=gpu.device),
        torch.as_tensor([1, 2], device="meta"),
        there(2, 3).double().new_zeros(4),
        there(2, 3)[:, :2].mT @ there(2, 3),
        torch.nn.Linear(3, 2).to(gpu.device)(there(2, 3)),
    ]
    assert all(isinstance(x, Far) and x.device == gpu.device and not x.is_cpu for x in made)
    assert made[2].tolist() == [[1.0]]
    x = there(2, 3)
    torch.testing.assert_close(x.cpu(), torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
    assert x.new_zeros(3, device="cpu").is_cpu


def test_writing_in_place_reaches_views_and_outputs(gpu: Pretend) -> None:
    x, out = there(2, 3), torch.empty(2, 3, device=gpu.device)
    x[:, 1:].fill_(7.0)
    torch.add(x, 1.0, out=out)
    assert x.mul_(2.0) is x
    assert x.tolist() == [[2.0, 14.0, 14.0], [8.0, 14.0, 14.0]]
    assert out.tolist() == [[2.0, 8.0, 8.0], [5.0, 8.0, 8.0]]
    y = out[:, None].squeeze_(1).t_()
    assert y.add_(1.0).shape == (3, 2)
    assert out.tolist() == [[3.0, 9.0, 9.0], [6.0, 9.0, 9.0]]


REFUSED: dict[str, Callable[[torch.Tensor], object]] = {
    "add": lambda x: x + torch.ones(3),
    "matmul": lambda x: x @ torch.ones(3),
    "cat": lambda x: torch.cat([x, torch.ones(1, 3)]),
    "stack of scalars": lambda x: torch.stack([x[0, 0], torch.tensor(1.0)]),
    "into the CPU": lambda x: torch.tensor(1.0).add_(x[0, 0]),
    "index of a CPU tensor": lambda x: torch.ones(3)[x[0].long() - 1],
    "CPU values": lambda x: x.index_put_((torch.tensor([0]),), torch.ones(3)),
    "a compiled operation": lambda x: _core.cholesky(x[None], torch.zeros(1, dtype=torch.int32)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_devices_are_not_mixed(gpu: Pretend, name: str) -> None:
    with pytest.raises(RuntimeError, match=r"several devices|Cannot pack tensors"):
        REFUSED[name](there(3, 3))


WAITS: dict[str, Callable[[torch.Tensor], object]] = {
    "_local_scalar_dense": lambda x: bool((x > 0).any()),
    "nonzero": lambda x: x.nonzero(),
    "index": lambda x: x[x > 2],
    "_unique2": lambda x: x.unique(),
    "bincount": lambda x: torch.bincount(x[0].long()),
    "_linalg_check_errors": lambda x: torch.linalg.inv(x @ x.mT + torch.eye(3, device=x.device)),
    "_linalg_eigh": lambda x: torch.linalg.eigh(x),
    "_to_copy": lambda x: x.cpu(),
    "copy_": lambda x: x.copy_(torch.ones(3, 3)),
}


@pytest.mark.parametrize("name", WAITS)
def test_waits_are_seen(gpu: Pretend, name: str) -> None:
    x = torch.full((3, 3), 3.0, device=gpu.device)
    WAITS[name](x)
    assert gpu.syncs == [name]


def test_a_cpu_index_is_copied_and_that_waits(gpu: Pretend) -> None:
    x = there(3, 2)
    assert x[torch.tensor([2, 0])].tolist() == [[5.0, 6.0], [1.0, 2.0]]
    assert gpu.syncs[1] == "index"  # after the way of x to the device


def test_the_rest_does_not_wait(gpu: Pretend) -> None:
    x = there(3, 3)
    gpu.syncs.clear()
    torch.linalg.cholesky_ex(x @ x.mT)
    torch.where(x > 2, x * torch.tensor(2.0), torch.tensor(0.0))
    x.masked_fill_(x > 2, torch.tensor(1.0))
    x[x[:, 0].long()] = 3.0
    x.to(torch.float64).sum(0).argsort()
    torch.ones(3, 3).to(gpu.device, non_blocking=True)
    assert gpu.syncs == []


def test_bytes_are_counted_while_they_are_held(gpu: Pretend) -> None:
    x = there(10, 10)
    assert gpu.allocated == gpu.peak == 400
    views = [x[2:], x.mT, x.view(-1), x.expand(5, -1, -1), x.add_(1.0), x.to(gpu.device)]
    assert gpu.allocated == gpu.peak == 400
    y = (x + 1.0).double()  # what is between them goes
    assert (gpu.allocated, gpu.peak) == (1200, 1600)
    torch.add(y, 1.0, out=y)
    assert len(x.cpu()) == 10
    assert gpu.peak == 1600
    del x
    assert gpu.allocated == 1200  # views hold it
    del views
    small = y.new_empty(1)
    assert (gpu.allocated, gpu.peak) == (808, 1600)
    del small
    gpu.reset_peak()
    assert gpu.peak == 800
    z = y.new_empty(3)
    assert (gpu.allocated, gpu.peak) == (824, 824)
    del y, z
    assert (gpu.allocated, gpu.peak) == (0, 824)


def test_what_goes_inside_of_a_function_is_in_the_peak_alone(gpu: Pretend) -> None:
    def norm(x: torch.Tensor) -> torch.Tensor:
        doubled = x.double()
        return (doubled @ doubled.mT).sum()

    found = norm(there(4, 8))
    assert (gpu.allocated, found.dtype) == (8, torch.float64)
    assert gpu.peak == 4 * 8 * (4 + 8) + 8 * 4 * 4 + 8


def test_outside_there_is_no_device() -> None:
    with Pretend():
        x = there(2, 2)
    with pytest.raises(RuntimeError, match="outside of"):
        x + 1
    y = torch.ones(2, device="meta")
    with Pretend(), pytest.raises(RuntimeError, match="not made inside"):
        y + 1
