"""Diversity of a prompt's completions, and closeness to a reference. Units are words and single signs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from vdr_cli.errors import ConfigError

_UNIT = re.compile(r"\w+|[^\w\s]")


def units(text: str) -> list[str]:
    """Words, and signs one by one: `1+2` has three units."""
    return _UNIT.findall(text)


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams over all n-grams of these texts (Li et al. 2016); NaN when there is none."""
    grams = [tuple(found[at : at + n]) for found in map(units, texts) for at in range(len(found) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def self_bleu(texts: Sequence[str]) -> float:
    """Mean BLEU of each text against the others, 0 to 1 (Zhu et al. 2018, Texygen); 1: all the same. NaN below two."""
    bleu = _bleu()
    split = [" ".join(units(text)) for text in texts]
    if len(split) < 2:
        return float("nan")
    scores = [bleu.sentence_score(text, split[:at] + split[at + 1 :]).score for at, text in enumerate(split)]
    return float(sum(scores) / len(scores) / 100.0)


def rouge_l(texts: Sequence[str], reference: str) -> list[float]:
    """ROUGE-L F1 of each text against the reference (Lin 2004), stemmed as in the usual implementations."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ConfigError("ROUGE-L needs rouge-score: pip install rouge-score") from None
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return [float(scorer.score(reference, text)["rougeL"].fmeasure) for text in texts]


def _bleu() -> Any:
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError:
        raise ConfigError("self-BLEU needs sacrebleu: pip install sacrebleu") from None
    return BLEU(effective_order=True, tokenize="none")
