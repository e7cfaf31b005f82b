"""A real vLLM server. VDR_VLLM_PYTHON names the interpreter of its environment: scripts/build/vllm_cpu_env.sh."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.rollout.test_vllm_dialogue import Game, same
from vdr_cli.config import RolloutConfig
from vdr_cli.errors import ConfigError
from vdr_cli.models.loading import eos_token_ids, load_causal_lm, load_tokenizer
from vdr_cli.models.policy import completion_logps
from vdr_cli.rollout import vllm_backend, weights
from vdr_cli.rollout.base import RolloutRequest
from vdr_cli.rollout.transformers_backend import TransformersRollout
from vdr_cli.rollout.vllm_backend import PROBE, VllmRollout, mean_difference
from vdr_cli.rollout.vllm_broadcast import Broadcast
from vdr_cli.rollout.vllm_client import VllmClient
from vdr_cli.rollout.weights import served_weights
from vdr_cli.samples import Sampling

INTERPRETER = os.environ.get("VDR_VLLM_PYTHON", "")
START = 900.0

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.network,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not INTERPRETER, reason="VDR_VLLM_PYTHON names no interpreter: VDR_VLLM=1 bash scripts/test.sh"),
]

PROMPTS = [[2, 3, 4, 5], [6, 7], [8, 9, 10]]


def free_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def own_server(directory: Path, **settings: object) -> VllmRollout:
    tokenizer, model = load_tokenizer("starter"), load_causal_lm("starter", torch.float32)
    config = RolloutConfig.model_validate({"backend": "vllm", "vllm": {"start_timeout": START, **settings}})
    return VllmRollout(config, tokenizer, tokenizer.pad_token_id, eos_token_ids(model, tokenizer), directory)


@pytest.fixture(scope="module", params=["directory", "broadcast"])
def rollout(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmRollout]:
    settings = {"python": INTERPRETER, "urls": [free_url()], "push": request.param}
    backend = own_server(tmp_path_factory.mktemp("served"), **settings)
    yield backend
    backend.close()


def test_greedy_tokens_and_logps_are_transformers_before_and_after_a_push(rollout: VllmRollout) -> None:
    model = load_causal_lm("starter", torch.float32)
    greedy, warm = Sampling(7, temperature=0), Sampling(7, temperature=0.8)
    own = TransformersRollout(rollout.pad_id, rollout.eos_ids)
    for _ in range(3):
        theirs = rollout.generate(model, RolloutRequest(PROMPTS, 1, greedy, [1, 2, 3]))
        assert torch.equal(
            theirs.completion_ids, own.generate(model, RolloutRequest(PROMPTS, 1, greedy, [1, 2, 3])).completion_ids
        )
        sampled = rollout.generate(model, RolloutRequest(PROMPTS, 16, warm, [1, 2, 3]))
        assert mean_difference(model, sampled, 0.8) < 1e-5
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)


def test_a_completion_depends_on_its_key_alone(rollout: VllmRollout) -> None:
    model, sampling = load_causal_lm("starter", torch.float32), Sampling(7)
    together = rollout.generate(model, RolloutRequest(PROMPTS, 4, sampling, [11, 22, 33]))
    alone = rollout.generate(model, RolloutRequest(PROMPTS[1:2], 4, sampling, [22])).completion_ids
    assert torch.equal(alone, together.completion_ids[4:8, : alone.shape[1]])


def test_episodes_of_several_turns(rollout: VllmRollout) -> None:
    """Greedy ones are those of the backend in the process; sampled ones have the log-probabilities of their history."""
    model, games = load_causal_lm("starter", torch.float32), [Game() for _ in range(3)]

    def request(game: Game, temperature: float) -> RolloutRequest:
        sampling = Sampling(max_new_tokens=24, temperature=temperature, turn_tokens=7)
        return RolloutRequest(PROMPTS, 4, sampling, [2, 4, 6], conversation=game)

    served = rollout.generate(model, request(games[0], 0.0))
    own = TransformersRollout(rollout.pad_id, rollout.eos_ids).generate(model, request(games[1], 0.0))
    assert same(served, own) and games[0].turns == games[1].turns
    out = rollout.generate(model, request(games[2], 1.0))
    logps, _ = completion_logps(model, out.prompt_ids, out.prompt_mask, out.completion_ids, out.completion_mask, 1.0)
    assert torch.allclose(logps[out.policy_mask], out.sampler_logps[out.policy_mask], atol=1e-4)
    for row, turns in games[2].turns.items():
        said = [token for turn in turns for token in turn.ids]
        assert out.completion_ids[row, out.policy_mask[row]].tolist() == said
    assert max(map(len, games[2].turns.values())) >= 3


def without_head(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights that save_pretrained writes of a tied model."""
    return {name: tensor for name, tensor in served_weights(model).items() if name != "lm_head.weight"}


@pytest.mark.parametrize("fault", ["stale", "head"])
def test_stale_weights_and_a_head_that_stayed_are_caught(
    fault: str, rollout: VllmRollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_causal_lm("starter", torch.float32)
    rollout.generate(model, RolloutRequest(PROMPTS, 2, PROBE, [1, 2, 3]))
    if fault == "stale":
        monkeypatch.setattr(VllmClient, "reload", lambda self, directory: None)
        monkeypatch.setattr(Broadcast, "send", lambda self, weights: None)
    else:
        monkeypatch.setattr(weights, "served_weights", without_head)
        monkeypatch.setattr(vllm_backend, "served_weights", without_head)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    with pytest.raises(ConfigError, match="differ from the trainer's by"):
        rollout.generate(model, RolloutRequest(PROMPTS, 2, PROBE, [1, 2, 3]))


@pytest.mark.parametrize(("ahead", "push"), [(0, "directory"), (1, "broadcast")])
def test_ten_steps_with_a_killed_server_and_resume(ahead: int, push: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "vdr_cli", "train", "--output", str(run)]
    for setting in (
        "train.steps=10",
        "train.checkpoint_every=2",
        "train.prompts_per_step=2",
        "rollout.group_size=4",
        "rollout.backend=vllm",
        f"rollout.ahead={ahead}",
        f"rollout.vllm.push={push}",
        f"rollout.vllm.python={INTERPRETER}",
        f"rollout.vllm.urls=[{free_url()}]",
        f"rollout.vllm.start_timeout={START}",
    ):
        command += ["--set", setting]
    training = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    metrics = run / "metrics.jsonl"
    while training.poll() is None and not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 4):
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(training.pid)], capture_output=True, text=True).stdout.split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    _, errors = training.communicate(timeout=300)
    assert training.returncode == 4, errors
    assert "vLLM server http://127.0.0.1" in errors.strip().splitlines()[-1]
    resumed = subprocess.run([*command, "--resume", "auto"], capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(1, 11))
    if ahead:  # the first step's completions are of the newest weights, the others' of those before
        apart = [step["sampling/sampling_logp_difference/mean"] for step in steps]
        assert all(later > 10 * apart[0] for later in apart[1:]), apart
