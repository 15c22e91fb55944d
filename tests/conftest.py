"""What has to happen before a test imports torchvision or Triton."""

import os
from importlib.util import find_spec
from pathlib import Path

import torch

if not torch.cuda.is_available():
    # GPU kernels are interpreted. Triton reads this when it is imported, which many packages do.
    os.environ["TRITON_INTERPRET"] = "1"


def _operators():
    """Define the operators that torchvision speaks of when it is imported; none is called here.

    PyPI's torchvision is built for the torch of CUDA that PyPI has, and beside a torch for the CPU
    its compiled operators do not load. All else in it is Python, which timm, open_clip and the
    processors of transformers need. A torchvision whose operators load is left alone.
    """
    found = find_spec("torchvision")
    if found is None:
        return None
    (folder,) = found.submodule_search_locations
    try:
        for compiled in Path(folder).glob("_C*.so"):
            torch.ops.load_library(compiled)
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


OPERATORS = _operators()  # kept: they are gone when the library is
