"""Every random number of a run, from the definitions in docs/audit.md: Philox streams named by what they are for.

NumPy only. The generator itself is written out, so that a change in a library's generator is seen as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
Array = NDArray[np.float64]

ROUNDS = 10
MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


def philox(key: tuple[int, int], count: int) -> Words:
    """The first `count` 64-bit words of Philox 4x64-10 (Salmon et al. 2011) under this key.

    Block n, from 1, is the cipher of the counter (n, 0, 0, 0); its four words follow in order.
    """
    blocks = -(-count // 4)
    c0 = np.arange(1, blocks + 1, dtype=np.uint64)
    c1, c2, c3 = (np.zeros(blocks, dtype=np.uint64) for _ in range(3))
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _product(MULTIPLIERS[0], c0)
        high1, low1 = _product(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ np.uint64(k0), low1, high0 ^ c3 ^ np.uint64(k1), low0
        k0, k1 = (k0 + WEYL[0]) % 2**64, (k1 + WEYL[1]) % 2**64
    return np.stack([c0, c1, c2, c3], axis=1).ravel()[:count]


def _product(multiplier: int, values: Words) -> tuple[Words, Words]:
    """High and low 64 bits of the 128-bit products, from 32-bit halves."""
    a, b = np.uint64(multiplier >> 32), np.uint64(multiplier & 0xFFFFFFFF)
    x, y = values >> HALF, values & LOW
    low = b * y
    middle = a * y + (low >> HALF)
    carried = b * x + (middle & LOW)
    return a * x + (middle >> HALF) + (carried >> HALF), (carried << HALF) | (low & LOW)


def completion_uniforms(seed: int, position: int, completion: int, count: int, stream: int = 1) -> Array:
    """(count,) in [0, 1) of this completion of the prompt at `position` of the training prompts.

    stream 1: number t decides token t; docs/audit.md lists the others.
    """
    digest = hashlib.blake2b(f"{seed}/{stream}/{position}".encode(), digest_size=8).digest()
    words = philox((int.from_bytes(digest, "little") >> 1, completion), count)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def clipped_uniforms(seed: int, step: int, row: int, count: int) -> Array:
    """(count,) in [0, 1): number t decides whether clip_cov leaves out token t of this row at this optimizer step."""
    digest = hashlib.blake2b(f"{seed}/10/{step}".encode(), digest_size=8).digest()
    words = philox((int.from_bytes(digest, "little") >> 1, row), count)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def acting_member(seed: int, position: int, members: int) -> int:
    """The member from which the prompt at `position` of the stream is sampled (rollout.members)."""
    digest = hashlib.blake2b(f"{seed}/11/{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 1) % members


def mask(seed: int, name: str, count: int, dropout: float) -> Array:
    """(count,) of 0 and 1/(1 - p): the mask that seed and name select.

    name: `step/member/layer/site`, and for masks drawn per token `step/member/layer/site/sequence`.
    """
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
    key = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
    words = philox(key, -(-count // 2))
    halves = np.stack([words & LOW, words >> HALF], axis=1).ravel()[:count]
    threshold = min(round(dropout * 2**32), 2**32 - 1)
    return (halves >= np.uint64(threshold)) / (1.0 - dropout)


def sequence_name(prompt_ids: Sequence[int], completion_ids: Sequence[int] = ()) -> str:
    """The name of a sequence in masks drawn per token: a hash of its tokens; of the prompt's alone before the end."""
    content = np.asarray(prompt_ids, dtype="<i8").tobytes() + b"|" + np.asarray(completion_ids, dtype="<i8").tobytes()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def prompt_rows(count: int, positions: Sequence[int], seed: int, shuffle: bool) -> list[int]:
    """Rows of a data set of `count` at these positions of the stream: pass after pass, each in an order of its own."""
    orders: dict[int, list[int]] = {}
    for epoch in {position // count for position in positions}:
        if shuffle:
            generator = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)))
            orders[epoch] = generator.permutation(count).tolist()
        else:
            orders[epoch] = list(range(count))
    return [orders[position // count][position % count] for position in positions]
