"""Completions from a server of our own that speaks vLLM's HTTP: those of the backend in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rollout.conftest import KEYS, PROMPTS, change, connect, tiny
from vdr_cli.errors import ConfigError, MachineError
from vdr_cli.rollout.base import RolloutRequest
from vdr_cli.rollout.transformers_backend import TransformersRollout
from vdr_cli.samples import Sampling


def test_completions_and_logps_are_the_servers(fake_vllm: Any, tmp_path: Path) -> None:
    model, sampling = tiny(), Sampling(max_new_tokens=9, temperature=1.2, top_k=20)
    out = connect(fake_vllm, tmp_path).generate(model, RolloutRequest(PROMPTS, 4, sampling, KEYS))
    own = TransformersRollout(0, [1]).generate(model, RolloutRequest(PROMPTS, 4, sampling, [key >> 1 for key in KEYS]))
    assert torch.equal(out.completion_ids, own.completion_ids)
    assert torch.equal(out.completion_mask, own.completion_mask)
    assert torch.equal(out.prompt_ids, own.prompt_ids)
    assert torch.equal(out.truncated, own.truncated)
    assert torch.allclose(out.sampler_logps, own.sampler_logps, atol=1e-5)


def test_prompts_are_spread_over_several_servers(fake_vllm: Any, tmp_path: Path) -> None:
    second = type(fake_vllm)()
    try:
        urls = [fake_vllm.url, second.url]
        sampling = Sampling(max_new_tokens=6)
        out = connect(fake_vllm, tmp_path, urls=urls).generate(tiny(), RolloutRequest(PROMPTS, 2, sampling, KEYS))
        own = TransformersRollout(0, [1]).generate(
            tiny(), RolloutRequest(PROMPTS, 2, sampling, [key >> 1 for key in KEYS])
        )
        assert torch.equal(out.completion_ids, own.completion_ids)
        assert fake_vllm.reloads == second.reloads == 1
        assert second.completions > len(PROMPTS)  # its own proof, and a prompt
        second.stale = True
        rollout, model = connect(fake_vllm, tmp_path, urls=urls), tiny()
        change(model)
        with pytest.raises(ConfigError, match=f"log-probabilities of {second.url} differ"):
            rollout.generate(model, RolloutRequest(PROMPTS, 2, sampling, KEYS))
    finally:
        second.stop()


def test_greedy_completions_are_asked_for_once(fake_vllm: Any, tmp_path: Path) -> None:
    sampling = Sampling(max_new_tokens=5, temperature=0)
    out = connect(fake_vllm, tmp_path).generate(tiny(), RolloutRequest(PROMPTS, 3, sampling, KEYS))
    own = TransformersRollout(0, [1]).generate(tiny(), RolloutRequest(PROMPTS, 3, sampling, KEYS))
    assert torch.equal(out.completion_ids, own.completion_ids)


def test_an_eos_as_the_last_allowed_token_ends_a_completion(fake_vllm: Any, tmp_path: Path) -> None:
    """Some servers look at the length first."""
    client = connect(fake_vllm, tmp_path).clients[0]
    choice = {"token_ids": [5, 2], "logprobs": {"token_logprobs": [-1.0, -1.0]}, "finish_reason": "length"}
    assert not client._answer(choice, (2,)).truncated and client._answer(choice, (3,)).truncated


def test_a_rank_without_prompts_still_pushes(fake_vllm: Any, tmp_path: Path) -> None:
    out = connect(fake_vllm, tmp_path).generate(tiny(), RolloutRequest([], 2, Sampling(4), []))
    assert len(out) == 0
    assert fake_vllm.reloads == 1


def test_servers_sample_while_the_trainer_does_something_else(fake_vllm: Any, tmp_path: Path) -> None:
    model, rollout, sampling = tiny(), connect(fake_vllm, tmp_path), Sampling(max_new_tokens=6)
    whole = rollout.generate(model, RolloutRequest(PROMPTS, 2, sampling, KEYS))
    told: dict[int, Any] = {}
    with fake_vllm.lock:  # nothing is answered meanwhile
        wait = rollout.start(
            model, RolloutRequest(PROMPTS, 2, sampling, KEYS, lambda places, given: told.update({places[0]: given}))
        )
        assert not told
    assert torch.equal(wait().completion_ids, whole.completion_ids)
    assert sorted(told) == [0, 1, 2] and len(told[1]) == 2


@pytest.mark.parametrize("push", ["directory", "broadcast"])
def test_a_server_sleeps_between_rollouts_and_wakes_with_the_newest_weights(
    push: str, fake_vllm: Any, tmp_path: Path
) -> None:
    model, sampling = tiny(), Sampling(6)
    fake_vllm.model = tiny()
    rollout = connect(fake_vllm, tmp_path, push=push, start_timeout=20)
    rollout.settings = rollout.settings.model_copy(update={"sleep": True})  # as with a server that vdr started
    for step in range(4):
        out = rollout.generate(model, RolloutRequest(PROMPTS, 2, sampling, KEYS))
        own = TransformersRollout(0, [1]).generate(
            model, RolloutRequest(PROMPTS, 2, sampling, [key >> 1 for key in KEYS])
        )
        assert torch.equal(out.completion_ids, own.completion_ids) and not fake_vllm.asleep
        for _ in range(2):  # once more changes nothing
            rollout.rest()
        assert fake_vllm.asleep == {"weights", "kv_cache"} and fake_vllm.naps == step + 1
        if step % 2:
            change(model)


def test_other_ranks_wait_until_a_server_is_awake(fake_vllm: Any, tmp_path: Path) -> None:
    model, sampling = tiny(), Sampling(6)
    ranks = [connect(fake_vllm, tmp_path, main=main, start_timeout=0.2) for main in (True, False)]
    for rank in ranks:
        rank.settings = rank.settings.model_copy(update={"sleep": True})
        rank.generate(model, RolloutRequest(PROMPTS, 2, sampling, KEYS))
    for rank in ranks:
        rank.rest()
    with pytest.raises(MachineError, match="rank 0 did not report"):
        ranks[1].generate(model, RolloutRequest(PROMPTS, 2, sampling, KEYS))
    assert fake_vllm.naps == 1
