"""The compiled CPU core. Every function checks dtype, shape and device of its tensors and writes in place."""

__version__: str

def detected_isa() -> str: ...
