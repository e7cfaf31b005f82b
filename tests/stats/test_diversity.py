import math

import pytest
from sacrebleu import sentence_bleu

from vdr_cli.stats.diversity import distinct, rouge_l, self_bleu, units


def test_units_are_words_and_signs() -> None:
    assert units("1+22*3 = don't!") == ["1", "+", "22", "*", "3", "=", "don", "'", "t", "!"]


def test_distinct_counts_ngrams_of_the_whole_group() -> None:
    assert distinct(["a b a", "a b"], 1) == pytest.approx(2 / 5)
    assert distinct(["a b a", "a b"], 2) == pytest.approx(2 / 3)
    assert math.isnan(distinct(["a", ""], 2))


def test_self_bleu_is_one_for_copies_and_the_librarys_number_otherwise() -> None:
    assert self_bleu(["the cat sat on it"] * 3) == pytest.approx(1.0)
    texts = ["the cat sat on the mat", "the cat lay on the mat", "dogs bark at night"]
    expected = [
        sentence_bleu(
            text, [other for other in texts if other != text], tokenize="none", use_effective_order=True
        ).score
        for text in texts
    ]
    assert self_bleu(texts) == pytest.approx(sum(expected) / 300)
    assert math.isnan(self_bleu(["alone"]))


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    same, half, none = rouge_l(["a cat sat", "a cat ran far", "dogs"], "a cat sat")
    assert same == 1.0
    assert half == pytest.approx(2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3))
    assert none == 0.0
