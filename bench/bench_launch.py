"""What a launch of the pooling kernel takes the host, to the door of CUDA: no GPU is needed.

A libcuda of stubs stands in for the driver, so that Triton makes its kernel for an H100 and hands
the launch over as it would there. What CUDA itself takes comes on top, and is not known here.
"""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if torch.cuda.is_available() or shutil.which("gcc") is None:
    pytest.skip("for machines with gcc and without a GPU", allow_module_level=True)

JOBS = {"cls": [("first", 1)], "cls, mean": [("first", 1), ("mean", 2)]}
STUBS = {  # all others do nothing and return 0
    "cuPointerGetAttribute": "(void **to, int what, void *at) { *to = at; return 0; }",
    "cuDeviceGetAttribute": "(int *to, int what, int device) { *to = 232448; return 0; }",
    "cuFuncGetAttribute": "(int *to, int what, void *at) { *to = what ? 0 : 1024; return 0; }",
    "cuCtxGetCurrent": "(void **to) { *to = (void *)1; return 0; }",
    "cuDriverGetVersion": "(int *to) { *to = 12080; return 0; }",
    "cuModuleLoadData": "(void **to, void *image) { *to = (void *)1; return 0; }",
    "cuModuleGetFunction": "(void **to, void *of, char *name) { *to = of; return 0; }",
    "cuLaunchKernelEx": "(void *config, void *of, void **given, void **rest)"
    " { launches++; x = *(void **)given[0]; return 0; }",
}


def stub(folder):
    """Make a libcuda and load it, so that whoever asks for one gets it."""
    nvidia = Path(triton.__file__).parent / "backends/nvidia"
    text = "".join((nvidia / name).read_text() for name in ("driver.c", "driver.py"))
    names = {*re.findall(r"\bcu[A-Z]\w+(?<!_t)\b", text)} | STUBS.keys()
    lines = [f"int {name}{STUBS.get(name, '() { return 0; }')}" for name in sorted(names)]
    source, library = folder / "stub.c", folder / "libcuda.so.1"
    source.write_text("\n".join(["long launches; void *x;", *lines, ""]))
    flags = ["-shared", "-fPIC", "-w", f"-Wl,-soname,{library.name}"]
    subprocess.run(["gcc", *flags, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


@pytest.fixture(scope="module")
def cuda(tmp_path_factory):
    """The stub, with a driver of Triton's that is active on it."""
    folder = tmp_path_factory.mktemp("cuda")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_LIBCUDA_PATH", str(folder))
        patch.setenv("TRITON_CACHE_DIR", str(folder / "cache"))
        library = stub(folder)
        from triton.backends.nvidia.driver import CudaDriver

        active = CudaDriver()
        patch.setattr(active, "get_current_device", lambda: 0)
        patch.setattr(active, "get_current_stream", lambda device: 0, raising=False)
        patch.setattr(active, "get_device_capability", lambda device: (9, 0))
        patch.setattr(triton.runtime.driver, "_active", active)
        yield library


@pytest.fixture(params=JOBS)
def call(request, cuda, monkeypatch):
    """Pool a batch; it is a launch of a kernel that is given the batch."""
    from geofast.kernels import pool as kernels

    monkeypatch.setattr(kernels, "_launchers", {})
    x, roles = torch.zeros(8, 257, 1024).bfloat16(), torch.ones(8, 257, dtype=torch.uint8)
    jobs = [(*job, torch.empty(8, 1024)) for job in JOBS[request.param]]
    launches = ctypes.c_long.in_dll(cuda, "launches")
    for _ in range(2):  # Triton's launch, and the kept one
        before = launches.value
        kernels.pool(x, roles, jobs)
        assert launches.value == before + 1
        assert ctypes.c_void_p.in_dll(cuda, "x").value == x.data_ptr()
    assert len(kernels._launchers) == 1
    return request.param, lambda: kernels.pool(x, roles, jobs)


def test_launch(benchmark, call):
    name, pool = call
    benchmark.group = f"host time of a launch: {name}"
    benchmark.pedantic(pool, rounds=200, iterations=100)


def test_launch_of_a_new_form(benchmark, call, monkeypatch):
    from geofast.kernels import pool as kernels

    name, pool = call
    benchmark.group = f"host time of a launch: {name}"
    kernels._launchers.clear()
    monkeypatch.setattr(kernels, "_keep", lambda *_: None)
    benchmark.pedantic(pool, rounds=200, iterations=100)
    assert not kernels._launchers
