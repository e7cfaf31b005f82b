"""Token steps replayed from CUDA graphs: the tokens of the growing cache, and no capture that fails unseen."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from gpu_reference import logits_by_hand, logp_error, model_on
from torch import Tensor, nn

from vdr_cli.disagreement.acting import by_position
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.rollout import static_cache
from vdr_cli.rollout.base import RolloutRequest
from vdr_cli.rollout.transformers_backend import CudaGraphs, TransformersRollout
from vdr_cli.samples import Completions, Sampling

PROMPTS, KEYS = [[5, 6, 7, 8, 9], [10], [11, 12, 13]], [101, 202, 303]


def sampled(
    model: nn.Module, graphs: CudaGraphs, new_tokens: int = 40, watcher: Seen | None = None, acting: Any = None
) -> Completions:
    rollout = TransformersRollout(0, [3, 4], cuda_graphs=graphs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a capture that fails warns
        request = RolloutRequest(PROMPTS, 6, Sampling(new_tokens), KEYS, watcher=watcher, acting=acting)
        return rollout.generate(model, request)


class Seen:
    """Records the first layer's states, as the ensemble's cache does."""

    def __init__(self, layer: nn.Module) -> None:
        self.seen: Tensor | None = None
        self.states: dict[tuple[int, int], Tensor] = {}
        self.handle = layer.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, arguments: object, output: tuple[Tensor, ...] | Tensor) -> None:
        self.seen = output[0] if isinstance(output, tuple) else output

    def prompts_were_read(self, prompts: Tensor) -> None:
        self.seen = None

    def token_was_read(self, rows: Tensor, t: int) -> None:
        assert self.seen is not None
        self.states |= {(int(row), t): state for row, state in zip(rows, self.seen[:, 0], strict=True)}
        self.seen = None


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("block", [8, 256])
def test_tokens_are_those_of_the_growing_cache(
    device: torch.device, kind: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows leave and blocks of columns begin in the middle: graphs are captured again."""
    monkeypatch.setattr(static_cache, "BLOCK", block)
    model = model_on(device, kind=kind)
    growing, static = sampled(model, "off"), sampled(model, "on")
    assert torch.equal(static.completion_ids, growing.completion_ids)
    assert torch.equal(static.completion_mask, growing.completion_mask)
    torch.testing.assert_close(static.sampler_logps, growing.sampler_logps, rtol=0, atol=1e-4)


def test_log_probabilities_are_the_models(device: torch.device, dtype: torch.dtype) -> None:
    model = model_on(device, dtype)
    drawn = sampled(model, "on", 12)
    logits = logits_by_hand(model, drawn, None, 0)[0].cpu()
    exact = logits.log_softmax(-1).gather(-1, drawn.completion_ids[..., None])[..., 0]
    error = (exact - drawn.sampler_logps)[drawn.completion_mask].abs().max()
    assert error < 2 * logp_error(dtype, logits)


def test_members_act_in_replayed_steps(device: torch.device) -> None:
    """Rows leave: the members of those that stay are those of the graph that is captured then."""
    model, block = model_on(device), by_position(EnsembleSpec(members=3, dropout=0.3), 0, [4, 5, 6])
    growing, static = sampled(model, "off", acting=block), sampled(model, "on", acting=block)
    assert torch.equal(static.completion_ids, growing.completion_ids)
    torch.testing.assert_close(static.sampler_logps, growing.sampler_logps, rtol=0, atol=1e-4)
    assert not torch.equal(sampled(model, "on").completion_ids, static.completion_ids)


def test_a_watched_layer_is_seen_in_replayed_steps(device: torch.device) -> None:
    model = model_on(device)
    found = {}
    for graphs in ("off", "on"):
        watcher = Seen(model.model.layers[0])
        sampled(model, graphs, watcher=watcher)  # type: ignore[arg-type]
        watcher.handle.remove()
        found[graphs] = watcher.states
    assert found["on"].keys() >= found["off"].keys()
    for key, state in found["off"].items():
        torch.testing.assert_close(found["on"][key], state, rtol=1e-4, atol=1e-4)


def test_a_model_that_waits_for_the_device_is_sampled_without_graphs(device: torch.device) -> None:
    model = model_on(device)
    expected = sampled(model, "on", 8)
    handle = model.model.norm.register_forward_hook(lambda *_: float(model.model.norm.weight.sum().cpu()) and None)
    rollout = TransformersRollout(0, [3, 4], cuda_graphs="on")
    try:
        if device.type == "cuda":
            with pytest.warns(UserWarning, match="continues without CUDA graphs"):
                drawn = rollout.generate(model, RolloutRequest(PROMPTS, 6, Sampling(8), KEYS))
            assert not rollout.can_capture
        else:
            drawn = rollout.generate(model, RolloutRequest(PROMPTS, 6, Sampling(8), KEYS))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = rollout.generate(model, RolloutRequest(PROMPTS, 6, Sampling(8), KEYS))
    finally:
        handle.remove()
    assert torch.equal(drawn.completion_ids, expected.completion_ids)
    assert torch.equal(again.sampler_logps, drawn.sampler_logps), "what failed once decides nothing but the speed"
