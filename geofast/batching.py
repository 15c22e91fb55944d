"""Batches by a budget of tokens: how long samples are, and how many go through a model at once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

# On two cores, 300 cities x 3 prompts through SmolLM2-135M took 44 s of CPU time in batches of 16
# samples, 33 s with 1024 tokens, 41 s with 2048 and 52 s with 4096, whose activations leave the
# cache; DINOv2-S on images of 257 tokens took the same with all of them. The budget of a GPU is not
# measured: it makes 127 such images a batch, and shrinks where memory is too small.
_TOKENS = {"cpu": 1024, "cuda": 32768}
_MOST = 1024  # samples, however short: more gain nothing, and their rows wait in memory
_NO_MEMORY = (  # the second is CUDA's, Triton's and our kernels'
    "DefaultCPUAllocator: can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED",
)  # fmt: skip


@dataclass
class Budget:
    """How many samples make a batch: samples x longest stays within `tokens`."""

    tokens: int
    samples: int = _MOST
    """Never more than so many."""
    largest: int = 0
    """Samples in the largest batch that went through."""
    cut: int = 0
    """Samples that batches were cut to when memory ran out; 0: it did not."""
    rows: int = 0
    """Rows that are added to statistics at once since memory ran out there; 0: it did not."""

    crowded: str = ""
    """The device that had no room for rows, which were kept on the CPU instead."""

    @classmethod
    def of(cls, device: torch.device, samples: int | None) -> Budget:
        """Return the budget of a device, with a cap of samples or without one."""
        return cls(_TOKENS.get(device.type, _TOKENS["cuda"]), samples or _MOST)

    def fit(self, longest: int) -> int:
        """Return how many samples of up to `longest` tokens make a batch; at least one."""
        return max(1, min(self.tokens // longest, self.samples))

    def sizes(self, lengths: NDArray[np.int64]) -> list[int]:
        """Return the sizes of batches, one after the other, of samples whose lengths fall."""
        sizes: list[int] = []
        done = 0
        while done < len(lengths):
            sizes.append(min(self.fit(int(lengths[done])), len(lengths) - done))
            done += sizes[-1]
        return sizes

    def note(self, samples: int) -> None:
        """Say that a batch went through."""
        self.largest = max(self.largest, samples)

    def shrink(self, samples: int, longest: int) -> None:
        """Say that memory did not take a batch: half of it is the budget from now on."""
        self.cut = max(1, samples // 2)
        self.tokens = self.cut * longest

    def sentence(self, lengths: Collection[Lengths]) -> str:
        """Say what batches of such samples are like."""
        few = min(self.fit(int(one.expected.max())) for one in lengths)
        many = max(self.fit(int(one.expected.min())) for one in lengths)
        most = max(len(one.expected) for one in lengths)
        few, many = min(few, most), min(many, most)
        range_ = f"{few}" if few == many else f"{few} to {many}"
        return f"batches of {range_} samples, at most {self.tokens:,} tokens"

    @property
    def warnings(self) -> list[str]:
        """What to tell about memory that ran out."""
        told = []
        if self.cut:
            told = [f"batches were cut to {self.cut} samples ({self.tokens:,} tokens)"]
        if self.rows:
            told += [f"statistics were added to by at most {self.rows} rows at once"]
        if self.crowded:
            room = f"the CPU's ordinary memory instead of {self.crowded}"
            told += [f"rows or statistics were kept in {room}"]
        return [f"{one} after out-of-memory; nothing was lost" for one in told]


@dataclass(frozen=True)
class Lengths:
    """How many tokens each sample is to the model."""

    expected: NDArray[np.int64]
    """[n]: of texts, counted; of images, as long as the first."""
    per_number: float = 0.0
    """Tokens for every number of a prepared image; 0 where `expected` is what they are."""

    def take(self, indices: NDArray[np.int64]) -> Lengths:
        """Keep some samples, in the order of `indices`."""
        return replace(self, expected=self.expected[indices])

    def of(self, index: NDArray[np.int64], inputs: Sequence[Any]) -> NDArray[np.int64]:
        """Return the lengths [b] of loaded samples.

        Images that are prepared in different sizes have tokens in proportion to their numbers.
        """
        if not self.per_number:
            return self.expected[index]
        counts = np.array([numbers(item) for item in inputs], dtype=np.float64)
        return np.ceil(counts * self.per_number - 1e-6).astype(np.int64)


def longest_first(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the order in which lengths fall; samples of one length stay as they are.

    Batches of like length waste little on padding, and the largest comes first: if it fits, all do.
    """
    return np.argsort(-lengths, kind="stable")


def numbers(item: Any) -> int:
    """Return how many numbers the tensors of a prepared sample hold; 0 for anything else."""
    if isinstance(item, torch.Tensor):
        return item.numel()
    if isinstance(item, Mapping):
        return sum(map(numbers, item.values()))
    return sum(map(numbers, item)) if isinstance(item, list) else 0


def token_counts(batch: Mapping[str, Any], samples: int) -> list[int]:
    """Return how many tokens each text of a batch has: by its mask, or else all places."""
    mask = batch.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.shape[:1] == (samples,) and mask.ndim == 2:
        return [int(n) for n in mask.sum(1).clamp_min(1)]
    places = (t.shape[1] for t in _tensors(batch) if t.ndim > 1 and len(t) == samples)
    return [max(1, next(places, 1))] * samples


def _tensors(batch: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    return (value for value in batch.values() if isinstance(value, torch.Tensor))


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on whichever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(told in str(error) for told in _NO_MEMORY)
