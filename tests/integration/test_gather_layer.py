"""engine.gather layer: vLLM samples, weights reach it layer by layer, members read layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from tests.rollout.conftest import FakeVllm
from vdr_cli.beds.registry import BEDS

pytestmark = pytest.mark.integration

STEPS = 10
SETTINGS: dict[str, Any] = {
    "rollout.backend": "vllm",
    "rollout.vllm.start_timeout": 60,
    "train.prompts_per_step": 3,  # one group on a rank, two on the other
    "train.steps": STEPS,
    "train.eval_every": 5,
    "train.eval_prompts": 5,
    "train.eval_samples": 4,
    "train.save_model": True,
    "train.checkpoint_every": 0,
    "grpo.beta": 0.01,
    "grpo.kl_in": "reward",
}


@pytest.fixture
def server() -> Iterator[FakeVllm]:
    """It holds other weights than the run begins with, and its LM head is a tensor of its own, as vdr serves models."""
    fake = FakeVllm()
    config = AutoConfig.from_pretrained(BEDS["starter"].model_path, tie_word_embeddings=False)
    fake.model = AutoModelForCausalLM.from_config(config).float().eval()
    yield fake
    fake.stop()


@pytest.mark.parametrize("push", ["broadcast", "directory"])
def test_ten_steps_are_those_of_the_whole_copy(train, read, tmp_path: Path, server: FakeVllm, push: str) -> None:
    """Ranks with different numbers of groups, a reference model, evaluations, a bonus."""
    runs = []
    for gather in ("whole", "layer"):
        run = tmp_path / gather
        settings = SETTINGS | {"rollout.vllm.urls": [server.url], "rollout.vllm.push": push, "engine.gather": gather}
        ended = train(run, ranks=2, settings=settings)
        assert ended.returncode == 0, ended.stderr
        runs.append((read.metrics(run), read.weights(run)))
    (whole, weights), (layer, same_weights) = runs
    assert [line["step"] for line in layer] == list(range(STEPS + 1))
    for before, after in zip(whole, layer, strict=True):
        assert before.keys() == after.keys()
        for name, value in before.items():
            assert after[name] == pytest.approx(value, rel=1e-4, abs=1e-6), (before["step"], name)
    for name, tensor in weights.items():
        assert (same_weights[name] - tensor).abs().max() < 1e-5, name


def test_a_server_that_fails_in_the_middle_ends_every_rank(
    train: Callable[..., Any], tmp_path: Path, server: FakeVllm
) -> None:
    """Rank 0 learns of it between two layers; the other rank waits for it in a gather."""
    settings = SETTINGS | {"rollout.vllm.urls": [server.url], "rollout.vllm.push": "broadcast"}
    server.breaks = True
    ended = train(tmp_path / "run", ranks=2, settings=settings | {"engine.gather": "layer", "train.eval_every": 0})
    assert ended.returncode == 4 and "planted in the middle" in ended.stderr
