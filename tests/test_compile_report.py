"""The GPU kernels compile for GPUs that are not here, and a spill is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

# Not imported: other tests interpret its kernels, for which a variable has to be set before.
if find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from geofast.kernels.compile_report import JOB_SETS, Line, read_usage

# What cuobjdump prints of a library with one kernel for two architectures.
DUMP = """
Fatbin elf code:
================
arch = sm_80
code version = [1,7]
host = linux
compile_size = 64bit

Resource usage:
 Common:
  GLOBAL:0
 Function gram_tiles:
  REG:{} STACK:{} SHARED:{} LOCAL:{} CONSTANT[0]:428 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90
Resource usage:
 Common:
  GLOBAL:0
 Function gram_tiles:
  REG:40 STACK:0 SHARED:2048 LOCAL:0 CONSTANT[0]:428 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


@pytest.mark.parametrize(
    ("stack", "local", "refused"), [(0, 0, False), (8, 0, True), (0, 16, True)]
)
def test_a_spill_is_refused(stack: int, local: int, refused: bool) -> None:
    first, second = read_usage(DUMP.format(255, stack, 1024, local))
    assert (first[0], second[0]) == ("sm_80", "sm_90")
    assert tuple(first[1]) == ("gram_tiles", 255, 1024, stack + local)
    line = Line("gram_tiles", *first)
    assert line.refused == refused == str(line).endswith("spills")
    assert not Line("gram_tiles", *second).refused


def test_a_kernel_that_does_not_compile_is_refused() -> None:
    line = Line("pool", "sm_100", None, "CompilationError: no such type")
    assert line.refused
    assert str(line).endswith("sm_100  does not compile: CompilationError: no such type")


def test_the_kernels_compile_without_spills(tmp_path: Path) -> None:
    # One architecture: `make check` takes all three, and a minute.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "geofast.kernels.compile_report", "90"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=tmp_path,  # away from the source tree, which holds no compiled core
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert not any("spills" in line or "does not compile" in line for line in lines)
    for dtype in ("float32", "float16", "bfloat16"):
        for jobs in JOB_SETS:
            assert any(line.startswith(f"pool {dtype} {jobs} ") for line in lines)
        assert any(line.startswith(f"gram {dtype} of 32 ") for line in lines)
