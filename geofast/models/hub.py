"""Where a checkpoint is: a folder, a GGUF file, or a repository of the Hugging Face Hub.

The Hub is asked once before transformers is. transformers asks again and again for half a minute
before it says that nobody answers, and its messages are written for its own users.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .packages import require_torchvision_that_fits


@dataclass(frozen=True)
class Source:
    """A checkpoint that is there."""

    path: str
    """Folder, or id on the Hub."""
    name: str
    """What reports call it."""
    gguf: str | None = None
    """The file in it that holds the weights, where that is GGUF."""
    complete: bool = True
    """Whether it has the file that was asked for: an adapter alone has no config.json."""
    cached: bool = False
    """Whether it is what was fetched before, because the Hub was not reached."""
    repository: str | None = None
    """Its id on the Hub; None of what lies in a folder of one's own."""
    trust_remote_code: bool = False
    """Run the Python files that come with the checkpoint."""

    @property
    def place(self) -> str:
        """What errors call it."""
        if not self.gguf:
            return self.path
        return (
            str(Path(self.path) / self.gguf)
            if Path(self.path).is_dir()
            else f"{self.path}:{self.gguf}"
        )

    @property
    def origin(self) -> str:
        """Where the same is found again: its id on the Hub, or an absolute path."""
        if self.repository is None:
            return str(Path(self.place).resolve())
        return f"{self.repository}:{self.gguf}" if self.gguf else self.repository

    @property
    def options(self) -> dict[str, Any]:
        """How every part of it is read by transformers."""
        given: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if self.gguf:
            given["gguf_file"] = self.gguf
        return given


def find(text: str, *, trust_remote_code: bool = False, file: str = "config.json") -> Source:
    """Find the checkpoint that `text` names.

    Parameters
    ----------
    text
        A folder, a GGUF file, an id of the Hub, or `ID:FILE.gguf`.
    trust_remote_code
        See `Source`.
    file
        What it should have. That it has not is no error here.

    Raises
    ------
    FileNotFoundError
        When there is no such folder, file or repository.
    PermissionError
        When it is gated.
    ConnectionError
        When the Hub cannot be reached, and it was not fetched before.
    """
    path, gguf = text, None
    if text.endswith(".gguf"):
        path, _, gguf = text.rpartition(":")
        if not path or Path(text).is_file():
            path, gguf = str(Path(text).parent), Path(text).name
            if not Path(text).is_file():
                raise FileNotFoundError(f"there is no file {text}")
    if Path(path).is_dir():
        complete = gguf is not None or (Path(path) / file).exists()
        name = gguf or Path(path).name
        return Source(path, name, gguf, complete, trust_remote_code=trust_remote_code)
    if Path(path).is_file():
        raise FileNotFoundError(
            f"{path} is a file and no checkpoint: name the folder that holds one"
        )
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise FileNotFoundError(f"there is no folder {path}")
    complete, folder = _ask(path, gguf or file)
    source = Source(
        path, gguf or path, gguf, complete, trust_remote_code=trust_remote_code, repository=path
    )
    return replace(source, path=folder, cached=True) if folder else source


def _ask(repository: str, file: str) -> tuple[bool, str | None]:
    """Ask the Hub for a file, once: is it there, and what folder of the cache stands in for it."""
    import huggingface_hub as hub
    from huggingface_hub import constants, errors

    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(repository, file))
    except errors.EntryNotFoundError:
        return False, None
    except errors.HFValidationError as error:
        msg = f"there is no folder {repository}, and it is no name on the Hugging Face Hub"
        raise FileNotFoundError(msg) from error
    except Exception as error:
        if not (isinstance(error, OSError) or _is_of_the_network(error)):
            raise
        if isinstance(found := hub.try_to_load_from_cache(repository, file), str):
            return True, str(Path(found).parents[file.count("/")])
        raise _refusal(repository, error, bool(constants.HF_HUB_OFFLINE)) from error
    return True, None


def _is_of_the_network(error: Exception) -> bool:
    # The Hub's client has gone through several libraries, whose errors share no class.
    return type(error).__module__.startswith(("httpx", "requests"))


def _refusal(repository: str, error: Exception, offline: bool) -> OSError:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return _gated(repository)
    if isinstance(error, errors.RepositoryNotFoundError):
        return FileNotFoundError(
            f"{repository} is not a local folder, and the Hugging Face Hub has no model of that "
            "name. Check the name; for a private one log in (`hf auth login`)"
        )
    if offline:
        return FileNotFoundError(
            f"{repository} is neither a local folder nor in the Hub's cache, and HF_HUB_OFFLINE is "
            "set: unset it, or fetch the model where there is a network"
        )
    return ConnectionError(
        f"{repository} is neither a local folder nor in the Hub's cache, and the Hugging Face Hub "
        f"cannot be reached ({said(error) or type(error).__name__}). Check the network, or give a "
        "folder"
    )


def _gated(repository: str) -> PermissionError:
    return PermissionError(
        f"{repository} is gated: ask for access at https://huggingface.co/{repository}, then log "
        "in here with `hf auth login` (or set HF_TOKEN)"
    )


# ------ what goes wrong while it is read


@contextmanager
def reading(what: str, source: Source) -> Iterator[None]:
    """Turn whatever a broken or forbidden file raises into one sentence.

    Raises
    ------
    PermissionError
        When the file is gated.
    ValueError
        When the checkpoint brings code of its own that is not trusted.
    ImportError
        When a package is missing.
    RuntimeError
        For everything else.
    """
    try:
        yield
    except Exception as error:
        require_torchvision_that_fits()
        raise _in_a_sentence(what, source, error) from error


def _in_a_sentence(what: str, source: Source, error: Exception) -> Exception:
    from huggingface_hub import errors

    if isinstance(error, torch.OutOfMemoryError):
        msg = (
            f"the {what} of {source.place} do not fit into memory: device_map='auto' "
            "(--device-map auto) spreads them over all devices and the main memory, "
            "dtype=torch.bfloat16 (--dtype bfloat16) halves them"
        )
        return RuntimeError(msg)
    if isinstance(error.__cause__, errors.GatedRepoError):
        return _gated(source.path)
    if "trust_remote_code" in str(error):
        return ValueError(untrusted(source.path))
    if "device_map" in str(error):
        why = textwrap.shorten(said(error), 200, placeholder=" ...")  # it may list every parameter
        return ValueError(f"device_map= (--device-map) does not fit {source.place}: {why}")
    if isinstance(error, ImportError):
        return ImportError(f"the {what} of {source.place} cannot be read: {said(error)}")
    if absent := re.search(r"Missing optional dependencies: ([^.]+)", str(error)):
        return ImportError(f"the {what} of {source.place} cannot be read without {absent[1]}")
    return RuntimeError(
        f"the {what} of {source.place} cannot be loaded: {said(error) or repr(error)} "
        f"({type(error).__name__}). Is the checkpoint whole? Fetch or save it again"
    )


def untrusted(path: str) -> str:
    """Say what code of a checkpoint's own means, and how to allow it."""
    return (
        f"{path} brings Python code of its own, which would run here with all your rights: read "
        "it, then allow it with trust_remote_code=True (--trust-remote-code)"
    )


def said(error: BaseException | str) -> str:
    """Return the first sentence of a message."""
    return re.split(r"\.?\s*\n|\. ", str(error).strip(), maxsplit=1)[0].rstrip(".")
