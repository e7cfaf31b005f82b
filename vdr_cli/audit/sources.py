"""A bonus source's numbers from a step's record, in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vdr_cli.audit import bonus as bonuses
from vdr_cli.audit import streams
from vdr_cli.audit.files import Record
from vdr_cli.audit.inputs import places_of
from vdr_cli.config import Config

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]

PERMUTATION = 2
"""Number of the stream that orders the bonus within groups."""


def numbers(record: Record, cfg: Config, task_advantages: Array) -> tuple[Array, Flags, Array | None]:
    """(b, where it is valid, the number of each completion): (B, 1) or (B, T) twice, and (B,).

    What a model or the run's history decides is taken from the record. The last is None where nothing is recomputed.
    """
    every = np.ones((len(record), 1), dtype=bool)
    on_file = record.numbers("reduced")[:, None]
    d = cfg.disagreement
    if d.mode == "end_of_sequence":
        return on_file, every, None
    measure = record.tokens("measure_tokens")
    reduced = bonuses.reduced(measure, record.mask, d.last_n)
    if d.credit == "token":
        return bonuses.credit(measure, record.mask, d.measure, d.discount, d.last_n), record.mask, reduced
    return on_file, every, reduced


def permutation_keys(record: Record, cfg: Config) -> Array:
    """(B,) the numbers that order the completions of each group."""
    return np.array([streams.completion_uniforms(*place, 1, PERMUTATION)[0] for place in _places(record, cfg)])


def _places(record: Record, cfg: Config) -> list[tuple[int, int, int]]:
    """(seed, position of the prompt, number in the group) of each completion."""
    G, positions = cfg.rollout.group_size, places_of(record, cfg).positions
    return [(cfg.train.seed, -1 if at is None else at, number) for at in positions for number in range(G)]
