"""Text that people read: untrusted text made safe, values and exceptions on one line, the name that was meant.

`visible` alone decides what a terminal or a page may receive. Model output may hold ANSI escapes, bidirectional
overrides ("Trojan Source", CVE-2021-42574), NUL bytes or half of a surrogate pair. Each is replaced by a
visible stand-in, so nothing is hidden or obeyed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

_BIDI = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_INVISIBLE = (0x00AD, 0x180E, 0x200B, 0x2028, 0x2029, 0x2060, *range(0x2061, 0x2066), 0xFEFF, *range(0xFFF9, 0xFFFC))
_TAGS = range(0xE0000, 0xE0080)
_SURROGATES = range(0xD800, 0xE000)

_STAND_INS: dict[int, str] = {
    **{code: chr(0x2400 + code) for code in range(0x20)},  # control pictures: ␀ ␛ ␊
    0x7F: "␡",
    **{code: f"<{code:02X}>" for code in range(0x80, 0xA0)},  # C1 controls: 0x9B alone starts an escape
    **{code: f"<U+{code:04X}>" for code in (*_BIDI, *_INVISIBLE, *_TAGS)},
    **dict.fromkeys(_SURROGATES, "\ufffd"),
}
_MULTILINE = {code: text for code, text in _STAND_INS.items() if code not in (0x09, 0x0A)}


def visible(text: str, multiline: bool = False) -> str:
    """The text with every control, override and invisible character replaced by a stand-in.

    multiline keeps newlines and tabs.
    """
    return text.translate(_MULTILINE if multiline else _STAND_INS)


def shortened(text: str, limit: int) -> str:
    """At most `limit` characters, the end cut off and marked."""
    return text if len(text) <= limit else text[: max(limit - 1, 0)] + "…"


def shown_value(value: object, limit: int = 60) -> str:
    """The value as Python writes it, in at most `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def reason(error: BaseException) -> str:
    """An exception's message on one line of at most 200 characters; its type where it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, for errors that go on with advice or a stack; its type without one."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The known name that a misspelt one is most like; None below `cutoff`, where 1 is equality."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return found[0] if found else None


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """`did you mean starter?`, or `otherwise` where no known name is like it."""
    near = nearest(name, known)
    return f"did you mean {near}?" if near else otherwise


def is_text(text: str) -> bool:
    """True when UTF-8 can hold it: JSON can spell half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def storable(text: str) -> str:
    """The text as valid UTF-8: halves of surrogate pairs become U+FFFD, everything else is kept."""
    if not is_text(text):
        return "".join("\ufffd" if "\ud800" <= char <= "\udfff" else char for char in text)
    return text


def duration(seconds: float) -> str:
    """h:mm:ss."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *first, last = names or [""]
    return f"{', '.join(first)} and {last}" if first else last
