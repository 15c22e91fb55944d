import subprocess
import sys

import geofast as gf

SCRIPT = """
import sys, torch
def refuse(*_, **__): raise AssertionError("importing geofast asked for CUDA")
torch.cuda.current_device = torch.cuda.init = refuse
torch.cuda._lazy_init = torch.cuda.is_available = refuse
import geofast
heavy = {"transformers", "triton", "matplotlib", "sklearn", "h5py", "onnx", "gguf"}
print(sorted(heavy & set(sys.modules)))
"""


def test_importing_is_light(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_every_public_name_is_there():
    assert sorted(gf.__all__) == gf.__all__
    assert all(hasattr(gf, name) for name in gf.__all__)
    assert dir(gf) == gf.__all__
