"""Environment variables that hold a number or a name: read, or refused in one line."""

from __future__ import annotations

from collections.abc import Mapping

from vdr_cli.errors import ConfigError

DEEPSPEED_TIMEOUT = "DEEPSPEED_TIMEOUT"
MOST_MINUTES = 1_000_000
"""Longest timeout of a collective, in minutes. Libraries count it in smaller units, which must not overflow."""
ACCELERATORS = ("cuda", "cpu")


def whole_number(environ: Mapping[str, str], name: str, default: int, least: int = 0, most: int | None = None) -> int:
    """The variable as a number; `default` where it is not set. ConfigError unless it is between least and most."""
    value = environ.get(name)
    if value is None:
        return default
    try:
        number = int(value)
    except ValueError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        bounds = f"{least} or more" if most is None else f"{least} to {most}"
        raise ConfigError(
            f"the environment variable {name} is {value!r}, not a whole number ({bounds}); correct it or unset it"
        )
    return number


def check_for_deepspeed(environ: Mapping[str, str]) -> None:
    """Raise ConfigError for a variable that DeepSpeed would fail to read while it is imported."""
    whole_number(environ, DEEPSPEED_TIMEOUT, 1, least=1, most=MOST_MINUTES)
    accelerator = environ.get("DS_ACCELERATOR")
    if accelerator is not None and accelerator not in ACCELERATORS:
        raise ConfigError(
            f"the environment variable DS_ACCELERATOR is {accelerator!r}; give {' or '.join(ACCELERATORS)}, or unset it"
        )
