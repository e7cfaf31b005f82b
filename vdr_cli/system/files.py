"""Files and directories that are there whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` for a file or a directory; on leaving it takes the place of `path`, on disk.

    After an exception `path` is as it was and nothing else is left. Raises OSError (disk full, no permission).
    """
    target = path.resolve()
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    remove(partial)
    try:
        yield partial
        sync_tree(partial)
        if target.is_dir():
            shutil.rmtree(target)
        partial.replace(target)
    except BaseException:
        remove(partial)
        raise
    sync(target.parent)


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace the file by this content, text as UTF-8. Raises OSError; the file is then as it was."""
    encoded = content.encode() if isinstance(content, str) else content
    if path.exists() and not path.is_file():  # /dev/stdout, a pipe: nothing that could be replaced
        path.write_bytes(encoded)
        return
    with replacing(path) as partial:
        partial.write_bytes(encoded)


def create_whole(path: Path, content: str) -> None:
    """`write_whole` for a file that must not be there yet. Raises FileExistsError when it is, or OSError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    write_whole(partial, content)
    try:
        os.link(partial, path)  # unlike a rename, a link never replaces a file
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        with path.open("x", encoding="utf-8") as file:
            file.write(content)
    finally:
        remove(partial)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until the file or directory is on disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """`sync` the file, or the directory with everything in it. Raises OSError."""
    for inner in path.rglob("*") if path.is_dir() else ():
        sync(inner)
    sync(path)


def remove(path: Path) -> None:
    """Delete the file or directory, if it is there. Raises OSError when that is not allowed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
