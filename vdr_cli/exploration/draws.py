"""Random numbers of completions: pure functions of the seed, a stream, and where the prompt stands in the data.

Any process draws any of them, so they are the same for any number of ranks and after a resume.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vdr_cli.samples import Stream, completion_key


def uniforms(seed: int, stream: Stream, positions: Sequence[int], group_size: int, count: int = 1) -> Tensor:
    """(B, count) float64 in [0, 1): one stream of Philox 4x64 per completion, as sampling's.

    positions: (B,) each completion's prompt's place in the stream of prompts; rows are whole groups, in order.
    """
    keys = [(completion_key(seed, stream, position), row % group_size) for row, position in enumerate(positions)]
    return _drawn(keys, count)


def table(seed: int, stream: Stream, index: int, shape: tuple[int, int]) -> Tensor:
    """`shape` float64 in [0, 1): a stream of its own for each row, chosen by `index` and the row's number."""
    key = completion_key(seed, stream, index)
    return _drawn([(key, row) for row in range(shape[0])], shape[1])


def _drawn(keys: Sequence[tuple[int, int]], count: int) -> Tensor:
    bits = np.empty((len(keys), count), dtype=np.uint64)
    for row, key in enumerate(keys):
        bits[row] = np.random.Philox(key=np.array(key, dtype=np.uint64)).random_raw(count)
    return torch.from_numpy((bits >> np.uint64(11)) * 2.0**-53)
