"""Compressed data files: what a name stands for, and the bytes behind it."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from vdr_cli.data import compression

TEXT = b'{"prompt": "a"}\n' * 1000
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
}  # fmt: skip


@pytest.mark.parametrize("ending", compression.ENDINGS)
def test_the_data_are_the_same_in_every_packing(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.JSONL{ending.upper()}"
    path.write_bytes(PACKED[ending](TEXT))
    assert compression.data_suffix(path) == ".jsonl"
    assert compression.is_compressed(path) == bool(ending)
    assert compression.read_bytes(path) == TEXT
    data, raw = compression.open_bytes(path)
    with raw, data:
        data.read()
        assert raw.tell() == path.stat().st_size, "how much of the file on disk has been read"


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz"])
def test_a_damaged_file_raises_what_readers_expect(ending: str, tmp_path: Path) -> None:
    torn, wrong, flipped = (tmp_path / f"{name}{ending}" for name in ("torn", "wrong", "flipped"))
    packed = bytearray(PACKED[ending](TEXT))
    torn.write_bytes(packed[:-9])
    wrong.write_bytes(b"no archive")
    packed[10:30] = bytes(255 - byte for byte in packed[10:30])  # gzip's header has ten bytes: its data are wrong
    flipped.write_bytes(packed)
    for path in (torn, wrong, flipped):
        with pytest.raises(compression.BROKEN):
            compression.read_bytes(path)
