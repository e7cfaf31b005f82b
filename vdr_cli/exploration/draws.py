"""Random numbers of completions: pure functions of the seed, a stream, and where the prompt stands in the data.

Any process draws any of them, so they are the same for any number of ranks and after a resume.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vdr_cli.samples import Stream, completion_key, uniform_rows


def uniforms(seed: int, stream: Stream, positions: Sequence[int], group_size: int, count: int = 1) -> Tensor:
    """(B, count) float64 in [0, 1): one stream of Philox 4x64 per completion, as sampling's.

    positions: (B,) each completion's prompt's place in the stream of prompts; rows are whole groups, in order.
    """
    keys = [(completion_key(seed, stream, position), row % group_size) for row, position in enumerate(positions)]
    return uniform_rows(keys, count)


def table(seed: int, stream: Stream, index: int, shape: tuple[int, int]) -> Tensor:
    """`shape` float64 in [0, 1): a stream of its own for each row, chosen by `index` and the row's number."""
    key = completion_key(seed, stream, index)
    return uniform_rows([(key, row) for row in range(shape[0])], shape[1])
