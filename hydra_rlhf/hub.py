"""Models that are named: folders here, or names on the Hub.

A name that is mistyped is told at once. Left to itself huggingface_hub takes it for a name on the
Hub and, without a network, asks for it for a minute before it says that it could not connect.
"""

from __future__ import annotations

import contextlib
import functools
import re
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

import huggingface_hub
import transformers.utils.hub
from huggingface_hub import constants

from hydra_rlhf.errors import UserError, first_line

_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_FILES = ("config.json", "adapter_config.json", "tokenizer_config.json", "tokenizer.json")


@contextlib.contextmanager
def loading(what: str, name: str | Path, *more: type[Exception]) -> Iterator[None]:
    """Around code that loads ``what`` from ``name``: its errors become a UserError in one line.

    Args:
        what: "a tokenizer", as it reads behind "cannot load".
        name: A folder, or a name on the Hub.
        more: What else the code raises, besides OSError and ValueError.
    """
    problem = missing(name)
    if problem is not None:
        raise UserError(f"cannot load {what} from {name}: {problem}")
    caught: tuple[type[Exception], ...] = (OSError, ValueError, *more)
    try:
        yield
    except caught as e:
        raise UserError(f"cannot load {what} from {name}: {first_line(e)}") from e


def missing(name: str | Path) -> str | None:
    """Why nothing can be loaded from a name, where that needs no answer from the Hub; or None."""
    folder = Path(name)
    if folder.is_dir():
        return None
    if folder.exists():
        return "it is a file, not a folder"
    if not _NAME.fullmatch(str(name)):
        return "there is no such folder"
    if _reaches_hub() or _cached(str(name)):
        return None
    return "there is no such folder, and the Hub cannot be reached from here"


def _cached(name: str) -> bool:
    found = (huggingface_hub.try_to_load_from_cache(name, file) for file in _FILES)
    return any(isinstance(path, str) for path in found)


@functools.cache
def _reaches_hub() -> bool:
    """Whether to ask the Hub. Where not, its libraries are told to look in their cache only."""
    if constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():  # which may know hosts that this machine does not
        return True
    try:
        socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True
        if hasattr(transformers.utils.hub, "_is_offline_mode"):  # transformers 4
            transformers.utils.hub._is_offline_mode = True
        return False
    return True
