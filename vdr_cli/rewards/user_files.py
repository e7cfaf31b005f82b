"""Reward files as importable modules: `vdr_cli.rewards.user_files.<name>_<code>`, where the code is the file's path.

Any process with this interpreter can import such a name: the children of a spawned process pool, which unpickle a
function by the name of its module, know nothing else of the file.
"""

from __future__ import annotations

import base64
import importlib.util
import re
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

__path__: list[str] = []  # makes this module a package to the import system; its modules are found below

_PREFIX = f"{__name__}."


def module_name(path: Path) -> str:
    """The name under which the file can be imported. path: absolute."""
    code = base64.b32encode(str(path).encode()).decode().rstrip("=").lower()
    return f"{_PREFIX}{re.sub(r'[^0-9A-Za-z]', '_', path.stem)}_{code}"


def file_of(name: str) -> Path | None:
    """The file that a module's name stands for; None for the name of another module."""
    if not name.startswith(_PREFIX):
        return None
    code = name.rpartition("_")[2].upper()
    try:
        return Path(base64.b32decode(code + "=" * (-len(code) % 8)).decode())
    except ValueError:
        return None


def make_importable(directory: Path) -> None:
    """Put the directory last on the path, so that a user's files never shadow a package."""
    if str(directory) not in sys.path:
        sys.path.append(str(directory))


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        file = file_of(fullname)
        if file is None:
            return None
        make_importable(file.parent)
        return importlib.util.spec_from_file_location(fullname, file)


sys.meta_path.append(_Finder())
