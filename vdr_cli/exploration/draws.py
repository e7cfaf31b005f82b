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
    bits = np.empty((len(positions), count), dtype=np.uint64)
    for row, position in enumerate(positions):
        key = np.array([completion_key(seed, stream, position), row % group_size], dtype=np.uint64)
        bits[row] = np.random.Philox(key=key).random_raw(count)
    return torch.from_numpy((bits >> np.uint64(11)) * 2.0**-53)
