"""Compile every GPU kernel for GPUs that are not here, and say what it takes of one.

    python -m geofast.kernels.compile_report            for sm_80, sm_90 and sm_100
    python -m geofast.kernels.compile_report 90

prints registers, shared memory and stack of every kernel by architecture, those of the CUDA C++
core too where it is built, and exits with 1 when one spills to memory or does not compile. Triton's
kernels are specialised by its own rules on the arguments that a launch would have. Its interpreter
takes the place of its compiler for a whole process, so this runs in one of its own.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

ARCHITECTURES = (80, 90, 100)
JOB_SETS = {
    "cls": (("first", 1),),
    "mean": (("mean", 0),),
    "cls+mean+max+min+last": (("first", 1), ("mean", 0), ("max", 0), ("min", 0), ("last", 0)),
}
_USAGE = re.compile(
    r"arch = (?P<sm>sm_\w+)|"
    r"Function (?P<name>\S+?):\s+REG:(?P<reg>\d+) STACK:(?P<stack>\d+) SHARED:(?P<shared>\d+)"
    r" LOCAL:(?P<local>\d+)"
)


class Usage(NamedTuple):
    """What a compiled kernel takes: registers a thread, bytes of shared memory, bytes of stack."""

    kernel: str
    registers: int
    shared: int
    stack: int


class Line(NamedTuple):
    """A line of the report: what a kernel takes, or why it did not compile."""

    name: str
    architecture: str
    usage: Usage | None
    error: str = ""

    @property
    def refused(self) -> bool:
        """Whether the kernel spills, or is not there."""
        return self.usage is None or self.usage.stack > 0

    def __str__(self) -> str:
        """Return the line as it is printed."""
        head = f"{self.name:<58} {self.architecture:<7}"
        if self.usage is None:
            return f"{head} does not compile: {self.error}"
        what = f"{self.usage.registers:>9} {self.usage.shared:>7} {self.usage.stack:>6}"
        return f"{head} {what}{'  spills' if self.refused else ''}"


def read_usage(dump: str) -> list[tuple[str, Usage]]:
    """Read what `cuobjdump --dump-resource-usage` prints; local memory counts as stack.

    Returns
    -------
    list
        (architecture, usage) of every kernel; a cubin alone names no architecture.
    """
    found, sm = [], ""
    for match in _USAGE.finditer(dump):
        if match["sm"]:
            sm = match["sm"]
        else:
            registers, stack, shared, local = map(
                int, match.group("reg", "stack", "shared", "local")
            )
            found.append((sm, Usage(match["name"], registers, shared, stack + local)))
    return found


def variants(architecture: int) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yield the name, the kernel and the arguments of every launch that is compiled."""
    from . import gram, pool

    wide, other = (64, 257, 1024), (64, 257, 1001)  # rows of 16 bytes' multiples, and not
    every = tuple(JOB_SETS)
    for dtype in pool.DTYPES:
        for jobs in every:
            yield _pool(dtype, jobs, wide)
    for jobs in every[1:]:
        for samples in (256, 1024):  # the wider blocks
            yield _pool(torch.bfloat16, jobs, (samples, 257, 1024))
        yield _pool(torch.bfloat16, jobs, other)
        yield _pool(torch.bfloat16, jobs, wide, packed=True)
    for dtype in gram.DTYPES:
        yield _gram(dtype, gram.PROBLEMS[-1], 1024, architecture)
        yield _gram(dtype, 1, 1001, architecture)
    yield _gram(torch.float32, 1, 1024, architecture)


_meta = partial(torch.empty, device="meta")


def _pool(
    dtype: torch.dtype, jobs: str, shape: tuple[int, int, int], packed: bool = False
) -> tuple[str, Any, dict[str, Any]]:
    from . import pool

    samples, tokens, dim = shape
    x, starts = _meta(shape, dtype=dtype), None
    if packed:
        x = _meta(1, samples * tokens, dim, dtype=dtype)
        starts = _meta(samples + 1, dtype=torch.int64)
    roles, out = _meta(x.shape[:2], dtype=torch.uint8), _meta(samples, dim)
    _, arguments = pool.launch(x, roles, [(op, b, out) for op, b in JOB_SETS[jobs]], starts)
    width = f"{arguments['BLOCK_T']} x {arguments['BLOCK_D']}"
    rest = (" packed" if packed else "") + ("" if dim % 16 == 0 else " odd")
    return f"pool {_short(dtype)} {jobs} {width}{rest}", pool.pool_kernel, arguments


def _gram(
    dtype: torch.dtype, problems: int, dim: int, architecture: int
) -> tuple[str, Any, dict[str, Any]]:
    from . import gram

    n, q, cells = 4096, 3, 5
    z, order = _meta(n, q, dtype=torch.float64), _meta(n, dtype=torch.int64)
    _, arguments = gram.launch(
        [_meta(n, dim, dtype=dtype)] * problems,
        [_meta(dim, dtype=torch.float64)] * problems,
        z,
        order,
        _meta(cells + 1, dtype=torch.int64),
        [_meta(cells, dim + q, dim + q, dtype=torch.float64)] * problems,
        architecture // 10,
    )
    width = f"{arguments['BLOCK_I']} x {arguments['BLOCK_J']}"
    rest = "" if dim % 16 == 0 else " odd"
    return f"gram {_short(dtype)} of {problems} {width}{rest}", gram.gram_kernel, arguments


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compile_as_launched(kernel: Any, arguments: dict[str, Any], architecture: int) -> Any:
    """Compile a kernel as a launch with these arguments on such a GPU would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", architecture, 32)
    backend = make_backend(target)
    # What JITFunction.run does between the call and the compiler, which takes the GPU at hand.
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, rest = bind(**arguments, debug=False)
    options, signature, constants, attributes = kernel._pack_args(
        backend, rest, bound, specialization, rest
    )
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def compile_number(number: int, architecture: int) -> Line:
    """Compile one of `variants`, by its number."""
    return line_of(*list(variants(architecture))[number], architecture)


def line_of(name: str, kernel: Any, arguments: dict[str, Any], architecture: int) -> Line:
    """Compile a kernel as a launch with these arguments would, and say what it takes."""
    sm = f"sm_{architecture}"
    try:
        compiled = compile_as_launched(kernel, arguments, architecture)
    except Exception as err:  # whatever a compiler throws is a line of the table
        return Line(name, sm, None, f"{type(err).__name__}: {' '.join(str(err).split())[-200:]}")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        ((_, usage),) = read_usage(_dump(file.name))
    return Line(name, sm, usage._replace(shared=compiled.metadata.shared))


def built_lines(library: str) -> list[Line]:
    """Return a line for every kernel that was built into a shared library."""
    return [Line(usage.kernel, sm, usage) for sm, usage in read_usage(_dump(library))]


def _dump(path: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [str(tool), "--dump-resource-usage", path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main(architectures: Sequence[int]) -> int:
    """Print the table; return 1 when a kernel spills or does not compile."""
    import triton

    print(f"Triton {triton.__version__}: registers a thread, bytes of shared memory and of stack")
    tasks = [(n, a) for a in architectures for n in range(len(list(variants(a))))]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as processes:
        lines = list(processes.map(compile_number, *zip(*tasks, strict=True)))
    cuda = importlib.util.find_spec("geofast._cuda")
    if cuda is not None and cuda.origin is not None:
        lines += built_lines(cuda.origin)
    for line in lines:
        print(line)
    if cuda is None:
        print("geofast._cuda is not built here")
    refused = sum(line.refused for line in lines)
    print(f"{len(lines)} kernels, {refused} of them refused")
    return int(refused > 0)


if __name__ == "__main__":
    sys.exit(main([int(word) for word in sys.argv[1:]] or ARCHITECTURES))
