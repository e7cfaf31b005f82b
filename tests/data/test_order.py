"""The stream of prompts: every row once a pass, the same for everyone, resumable from any position."""

from hypothesis import given
from hypothesis import strategies as st

from vdr_cli.data.order import epoch_order, stream_indices


@given(st.integers(1, 40), st.integers(0, 2**70), st.booleans())
def test_every_pass_is_a_permutation(n, seed, shuffle):
    stream = stream_indices(n, 0, 3 * n, seed, shuffle)
    for epoch in range(3):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))


@given(st.integers(1, 40), st.integers(0, 100), st.integers(0, 50))
def test_a_later_start_reads_the_same_stream(n, first, count):
    assert stream_indices(n, 0, first + count, 3, True)[first:] == stream_indices(n, first, count, 3, True)


def test_shuffled_passes_and_seeds_differ():
    assert epoch_order(50, 0, 0, True) != epoch_order(50, 0, 1, True) != epoch_order(50, 1, 1, True)
    assert epoch_order(50, 0, 7, False) == tuple(range(50))


def test_known_permutation():
    """Fixed numbers: another machine or a later version must draw the same prompts, or a resumed run differs."""
    assert stream_indices(8, 0, 8, 0, True) == [5, 0, 6, 1, 7, 2, 4, 3]
