"""Names of files, directories, models and data as a user types them: what no file system can hold is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from vdr_cli.beds.gym import is_suite
from vdr_cli.errors import ConfigError

LONGEST_NAME = 255  # bytes between two slashes, on every file system in use


def path_text(text: str) -> str:
    """The text, a leading ~ replaced by the home directory. ValueError says what makes it no path."""
    if not text.strip():
        raise ValueError("is empty; give a name or a path")
    if not text.isprintable():
        raise ValueError(f"{text!r} has a character that cannot be printed; give a plain name or path")
    if is_suite(text):
        return text
    if any(len(part.encode()) > LONGEST_NAME for part in text.split("/")):
        raise ValueError(f"{text[:40]}... is longer than a file name can be ({LONGEST_NAME} bytes)")
    if not text.startswith("~"):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        raise ValueError(f"{text}: there is no such user, so no such home directory") from None


PathText = Annotated[str, AfterValidator(path_text)]


def checked_path(text: str, key: str) -> Path:
    """The text as a path. ConfigError, naming the key, for text that no file system can hold."""
    try:
        return Path(path_text(text))
    except ValueError as error:
        raise ConfigError(f"{key} {error}") from None


def looks_like_path(name: str) -> bool:
    """True for what can only be meant as a file or directory, not as a hub id (owner/name)."""
    return name.startswith(("/", ".", "~")) or Path(name).exists() or name.count("/") > 1
