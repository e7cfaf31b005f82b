"""The answer in a completion: all of it, what stands in <answer> tags, or a boxed expression."""

from __future__ import annotations

import re

from vdr_cli.config.sections.rewards import Extract

_TAGS = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BOXED = re.compile(r"\\boxed\s*\{")


def answer_in(text: str, how: Extract) -> str | None:
    """The last answer of a completion, white space at its ends aside; None where there is none."""
    if how == "answer_tags":
        found = _TAGS.findall(text)
        return found[-1].strip() if found else None
    return _boxed(text) if how == "boxed" else text.strip()


def _boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} whose braces close."""
    for start in reversed([match.end() for match in _BOXED.finditer(text)]):
        depth = 1
        for place in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[start:place].strip()
    return None
