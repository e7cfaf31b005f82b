"""The arguments of vdr: as one word that no shell on the way to a rank reads differently, and what they resume.

DeepSpeed's runner joins a remote command with spaces and hands it to a shell on each host; a `--set`
value with brackets or quotes would arrive as something else.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from itertools import pairwise

ENCODED = "--encoded-arguments="
"""`python -m vdr_cli` takes this word, followed by the code, in place of arguments."""


def encode(argv: list[str]) -> str:
    """Arguments to one word of letters, digits, dash, underscore and equals sign."""
    return ENCODED + base64.urlsafe_b64encode(json.dumps(argv).encode()).decode()


def decode(given: Sequence[str]) -> list[str]:
    """The arguments that encode() was given, when its word comes last; others as they are."""
    if not given or not given[-1].startswith(ENCODED):
        return list(given)
    return list(json.loads(base64.urlsafe_b64decode(given[-1].removeprefix(ENCODED))))


def named_checkpoint(arguments: Sequence[str]) -> str | None:
    """The path that --resume gives; None without one, and for auto."""
    found = None
    for word, after in pairwise([*arguments, ""]):
        if word == "--resume" or word.startswith("--resume="):
            found = word.partition("=")[2] or after
    return None if found == "auto" else found
