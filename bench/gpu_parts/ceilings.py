"""What the GPU does at most, and which of geofast's kernels serve it."""

import torch

from .timing import median_seconds


def main(run):
    serving(run)
    size = 64 if run.dry else 8192
    copy = copy_rate(run, 1 << 12 if run.dry else 2 << 30)
    run.row(
        "ceilings", what="copy", figure=copy, unit="GB/s", how="device to device, read + written"
    )
    for dtype, name in (
        (torch.bfloat16, "bf16"),
        (torch.float64, "float64"),
        (torch.float32, "float32"),
    ):
        with run.case(f"{name} products"):
            rate = matmul_rate(run, size, dtype)
            run.row("ceilings", what=name, figure=rate, unit="TFLOP/s", how=f"torch {size}^3")
    with run.case("host to device"):
        pinned = upload_rate(run, 1 << 12 if run.dry else 1 << 30)
        run.row("ceilings", what="upload", figure=pinned, unit="GB/s", how="from pinned memory")


def serving(run):
    """Record which implementation serves; on a GPU, that torch does is a failure."""
    import geofast
    from geofast import _ops

    run.note(f"geofast {geofast.__version__} of {geofast.__file__}: {_ops.describe(run.device)}")
    if run.device.type == "cuda":
        from geofast import _gpu

        for reason in _gpu.lacking(torch.device("cuda", 0)):
            run.error(f"a kernel is missing: {reason}")


def copy_rate(run, nbytes):
    """Return GB/s, bytes read and bytes written."""
    a = torch.randint(0, 100, (nbytes // 8,), device=run.device)
    b = torch.empty_like(a)
    return 2 * nbytes / median_seconds(run, [lambda: b.copy_(a)]) / 1e9


def matmul_rate(run, size, dtype):
    """Return TFLOP/s of a product of random square matrices (float32: without TF32)."""
    a, b = (torch.randn(size, size, device=run.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / median_seconds(run, [lambda: torch.mm(a, b, out=out)]) / 1e12


def upload_rate(run, nbytes):
    """Return GB/s from pinned memory."""
    a = torch.randint(0, 100, (nbytes // 8,), pin_memory=not run.dry)
    b = torch.empty_like(a, device=run.device)
    return nbytes / median_seconds(run, [lambda: b.copy_(a, non_blocking=True)]) / 1e9
