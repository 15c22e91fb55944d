"""Compare llama.cpp's answers under control vectors with those of the edits they were made of.

python tools/check_control_vector.py LLAMA_COMPLETION MODEL.gguf

LLAMA_COMPLETION is llama.cpp's program of that name, MODEL.gguf the demos' SmolLM2-135M, converted
by llama.cpp's convert_hf_to_gguf.py with --outtype f32. Fails where an answer differs.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import geofast as gf
from geofast.data.demos import smollm2

TOKENS = 16
PROMPTS = [
    "The city of Paris is in the country of",
    "The capital of Japan is",
    "My favourite place on Earth is",
]
LENGTHS = {3: 8.0, 10: 20.0, 20: 80.0}  # by layer: each changes some answers


def theirs(program: str, model: str, prompt: str, vector: Path) -> str:
    """Return what llama.cpp answers, greedily and in float32."""
    plain = ["-no-cnv", "--no-warmup", "--temp", "0", "-fa", "off", "-ctk", "f32", "-ctv", "f32"]
    command = [program, "-m", model, "-p", prompt, "-n", str(TOKENS), *plain]
    made = subprocess.run(
        [*command, "--control-vector", str(vector)], capture_output=True, text=True, check=True
    )
    return made.stdout.strip().removeprefix(prompt).strip()


def main(program: str, path: str) -> int:
    """Print both answers to every prompt at every layer; return how many differ."""
    model, wrong = gf.load(smollm2(), dtype=torch.float32), 0
    generator = torch.Generator().manual_seed(0)
    bare = model.generate(PROMPTS, max_new_tokens=TOKENS)
    for layer, length in LENGTHS.items():
        way = torch.randn(576, generator=generator)
        edit = gf.add(f"lm.layers.{layer}", way, 1.0, length, role="all", phase="both")
        ours = model.generate(PROMPTS, edit, max_new_tokens=TOKENS)
        assert ours != bare
        with tempfile.TemporaryDirectory() as folder:
            vector = Path(folder) / "vector.gguf"
            gf.save_control_vector(edit, vector, model)
            for prompt, mine in zip(PROMPTS, ours, strict=True):
                other = theirs(program, path, prompt, vector)
                wrong += other != mine.strip()
                print(f"layer {layer}: {mine.strip()!r}, llama.cpp {other!r}")
    print(f"{wrong} of {len(LENGTHS) * len(PROMPTS)} answers differ")
    return wrong


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) > 0)
