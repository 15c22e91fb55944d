"""Packages that geofast can do without, and what to do where one is missing or does not fit."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch


def optional(name: str, package: str) -> Any:
    """Import a module that `package` of the index brings, and that `NAME:...` asks for.

    Raises
    ------
    ImportError
        When it is not installed.
    RuntimeError
        See `require_torchvision_that_fits`.
    """
    if find_spec(name) is None:
        msg = f"{name}: names a model of the package {name}, which is not here: "
        raise ImportError(f"{msg}pip install {package}")
    require_torchvision_that_fits()
    return import_module(name)


def require_torchvision_that_fits() -> None:
    """Raise where torchvision is installed, but for another torch than the one that is here.

    Raises
    ------
    RuntimeError
        Naming both versions; torchvision's own error is of an operator that does not exist.
    """
    if find_spec("torchvision") is None:
        return
    try:
        import_module("torchvision")
    except Exception as error:
        said = (str(error).splitlines() or [repr(error)])[0]
        msg = (
            f"torchvision {version('torchvision')} was built for another torch than "
            f"{torch.__version__}, which is here ({said}): install the torchvision that belongs to "
            f"torch {torch.__version__}, from where this torch came"
        )
        raise RuntimeError(msg) from error


@contextmanager
def quietly() -> Iterator[None]:
    """Keep off stderr what transformers and peft tell their own, and bars where no terminal is.

    That is: the ids of a text's first and last token lie outside the vocabulary, which only
    generation reads; and peft calls a property of transformers by the name that it had before.
    """
    from transformers.utils import logging as theirs

    gguf: Any = import_module("transformers.modeling_gguf_pytorch_utils")
    logger = logging.getLogger("transformers.configuration_utils")
    bars = theirs.is_progress_bar_enabled() and not sys.stderr.isatty()
    bar_of_gguf, gguf.tqdm = gguf.tqdm, theirs.tqdm  # its own does not ask whether bars are enabled
    logger.addFilter(_matters)
    if bars:
        theirs.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            renamed = "`is_gradient_checkpointing` is deprecated"
            warnings.filterwarnings("ignore", renamed, FutureWarning)
            yield
    finally:
        logger.removeFilter(_matters)
        gguf.tqdm = bar_of_gguf
        if bars:
            theirs.enable_progress_bar()


def _matters(record: logging.LogRecord) -> bool:
    return not re.match("Model config: (bos|eos)_token_id must be", record.getMessage())
