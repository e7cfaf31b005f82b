"""The generator against NumPy's, and every stream against what its name selects."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from vdr_cli.audit import streams


@pytest.mark.parametrize("key", [(0, 0), (1, 2), (2**64 - 1, 2**63 + 5)])
def test_philox_is_numpys(key):
    theirs = np.random.Philox(key=np.array(key, dtype=np.uint64)).random_raw(1001)
    assert streams.philox(key, 1001).tolist() == theirs.tolist()
    assert streams.philox(key, 7).tolist() == theirs[:7].tolist()


def test_completion_uniforms_are_53_bits_of_a_word_each():
    key = int.from_bytes(hashlib.blake2b(b"5/1/12", digest_size=8).digest(), "little") >> 1
    words = np.random.Philox(key=np.array([key, 3], dtype=np.uint64)).random_raw(4)
    found = streams.completion_uniforms(5, 12, 3, 4)
    assert found.tolist() == [(int(word) >> 11) / 2**53 for word in words]


def test_a_mask_reads_32_bits_an_entry_low_half_first():
    digest = hashlib.blake2b(b"9/2/0/1/mlp", digest_size=16).digest()
    words = np.random.Philox(key=np.frombuffer(digest, dtype="<u8")).random_raw(2)
    halves = [int(w) >> shift & 0xFFFFFFFF for w in words for shift in (0, 32)]
    expected = [0.0 if half < 0.3 * 2**32 else 1 / 0.7 for half in halves]
    assert streams.mask(9, "2/0/1/mlp", 3, 0.3).tolist() == pytest.approx(expected[:3])


def test_masks_differ_by_seed_step_member_layer_and_site_and_drop_a_share_p():
    names = ["0/0/0/mlp", "1/0/0/mlp", "0/1/0/mlp", "0/0/1/mlp", "0/0/0/attention"]
    drawn = [streams.mask(seed, name, 512, 0.2) for seed, name in [*((0, name) for name in names), (1, names[0])]]
    assert len({mask.tobytes() for mask in drawn}) == 6
    assert np.mean([mask == 0 for mask in drawn]) == pytest.approx(0.2, abs=0.03)


def test_prompt_rows_are_passes_in_an_order_of_their_own():
    first, second = ([*streams.prompt_rows(7, range(start, start + 7), 3, True)] for start in (0, 7))
    assert sorted(first) == sorted(second) == list(range(7)) and first != second
    assert first != streams.prompt_rows(7, range(7), 4, True)
    assert streams.prompt_rows(3, range(2, 7), 0, False) == [2, 0, 1, 2, 0]


def test_a_sequences_name_is_its_tokens():
    names = {streams.sequence_name(*each) for each in (([1, 2],), ([1], [2]), ([1, 2], [3]), ([1, 2, 3],))}
    assert len(names) == 4
