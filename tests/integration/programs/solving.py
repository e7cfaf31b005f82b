"""Held-out prompts that are solved once: in the evaluation after the third step, before its line is written."""

import os
import pathlib

METRICS = pathlib.Path(os.environ["METRICS"])


def solving(completions, held_out, **_):
    third = METRICS.exists() and len(METRICS.read_text().splitlines()) == 3
    return [float(third) if out else len(text) / 10 for text, out in zip(completions, held_out, strict=True)]
