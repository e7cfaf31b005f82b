"""Files that may be compressed: what kind of data a name stands for, and its bytes."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.GzipFile, ".bz2": bz2.BZ2File, ".xz": lzma.LZMAFile}

BROKEN = (zlib.error, lzma.LZMAError, EOFError, OSError)
"""Errors that reading a damaged compressed file raises."""


def data_suffix(path: Path) -> str:
    """The lower-case suffix of the data themselves: `.jsonl` of a.jsonl and of a.jsonl.gz."""
    inner = path.with_suffix("") if path.suffix.lower() in _OPENERS else path
    return inner.suffix.lower()


ENDINGS = ("", *_OPENERS)
"""Suffixes that may follow a data suffix."""


def is_compressed(path: Path) -> bool:
    return path.suffix.lower() in _OPENERS


def open_bytes(path: Path) -> tuple[IO[bytes], IO[bytes]]:
    """(the data, the file on disk that they are read from), the same object when nothing is compressed.

    The second one's position tells how much of the file has been read. Raises OSError.
    """
    raw = path.open("rb")
    if not is_compressed(path):
        return raw, raw
    by_keyword = {"fileobj": raw} if path.suffix.lower() == ".gz" else {"filename": raw}
    return cast("IO[bytes]", _OPENERS[path.suffix.lower()](**by_keyword)), raw


def read_bytes(path: Path) -> bytes:
    """All of the data. Raises one of BROKEN when the file is damaged."""
    data, raw = open_bytes(path)
    with raw, data:
        return data.read()
