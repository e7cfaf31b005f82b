"""vLLM servers that do not start, fail, are lost or too old: each fault planted once."""

from __future__ import annotations

import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rollout.conftest import KEYS, PROMPTS, NoTokenizer, change, connect, tiny
from vdr_cli.config import RolloutConfig
from vdr_cli.errors import ConfigError, MachineError
from vdr_cli.rollout.base import Rollout, RolloutRequest
from vdr_cli.rollout.build import open_rollout
from vdr_cli.rollout.transformers_backend import TransformersRollout
from vdr_cli.rollout.vllm_backend import VllmRollout
from vdr_cli.rollout.vllm_client import VllmClient
from vdr_cli.samples import Sampling


def test_no_server_at_the_start_is_named(tmp_path: Path) -> None:
    config = RolloutConfig(backend="vllm", vllm={"urls": ["http://127.0.0.1:9"], "start_timeout": 0.1})
    rollout = VllmRollout(config, NoTokenizer(), 0, [1], tmp_path)  # type: ignore[arg-type]
    with pytest.raises(MachineError, match=r"127.0.0.1:9 is not ready"):
        rollout.generate(tiny(), RolloutRequest(PROMPTS, 2, Sampling(4), KEYS))


def test_a_wrong_interpreter_is_refused(tmp_path: Path) -> None:
    config = RolloutConfig(backend="vllm", vllm={"python": str(tmp_path / "python")})
    rollout = VllmRollout(config, NoTokenizer(), 0, [1], tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"rollout.vllm.python: .* is not an interpreter"):
        rollout.generate(tiny(), RolloutRequest(PROMPTS, 2, Sampling(4), KEYS))


def test_a_server_that_ends_while_starting_is_explained(tmp_path: Path) -> None:
    config = RolloutConfig(
        backend="vllm", vllm={"python": sys.executable, "urls": ["http://127.0.0.1:9"], "start_timeout": 60}
    )
    with open_rollout(config, NoTokenizer(), [1], tmp_path, main=True) as rollout:
        backend: Rollout = rollout
        with pytest.raises(MachineError, match=r"ended while starting: it ended with code 1; last line of .*vllm"):
            backend.generate(tiny(), RolloutRequest(PROMPTS, 2, Sampling(4), KEYS))


def test_old_versions_short_contexts_and_closed_servers_are_refused(fake_vllm: Any, tmp_path: Path) -> None:
    fake_vllm.version = "0.9.2"
    with pytest.raises(ConfigError, match=r"runs vLLM 0.9.2; 0.11 or newer"):
        connect(fake_vllm, tmp_path).generate(tiny(), RolloutRequest(PROMPTS, 2, Sampling(4), KEYS))
    fake_vllm.version, fake_vllm.max_model_len = "0.32.1+cpu", 10
    with pytest.raises(ConfigError, match=r"rollout.max_new_tokens: .* take 104 tokens"):
        connect(fake_vllm, tmp_path).generate(tiny(), RolloutRequest(PROMPTS, 2, Sampling(100), KEYS))
    fake_vllm.development = False
    with pytest.raises(ConfigError, match="VLLM_SERVER_DEV_MODE=1"):
        connect(fake_vllm, tmp_path).generate(tiny(), RolloutRequest(PROMPTS, 2, Sampling(4), KEYS))


def test_a_server_error_is_retried_with_a_limit(fake_vllm: Any, tmp_path: Path) -> None:
    rollout = connect(fake_vllm, tmp_path)
    rollout.generate(tiny(), RolloutRequest(PROMPTS, 2, Sampling(4), KEYS))
    fake_vllm.fails = 1
    rollout.generate(tiny(), RolloutRequest(PROMPTS, 2, Sampling(4), KEYS))
    fake_vllm.fails = 100
    with pytest.raises(MachineError, match=f"{fake_vllm.url} answered /v1/completions with 500.*planted"):
        rollout.generate(tiny(), RolloutRequest(PROMPTS, 2, Sampling(4), KEYS))


def test_a_server_lost_in_the_middle_is_named(fake_vllm: Any, tmp_path: Path) -> None:
    rollout = connect(fake_vllm, tmp_path)
    rollout.generate(tiny(), RolloutRequest(PROMPTS, 2, Sampling(4), KEYS))
    url = fake_vllm.url
    fake_vllm.stop()
    with pytest.raises(MachineError, match=f"vLLM server {url} does not answer"):
        rollout.generate(tiny(), RolloutRequest(PROMPTS, 2, Sampling(4), KEYS))


@pytest.mark.parametrize("push", ["directory", "broadcast"])
@pytest.mark.parametrize("when", ["sampling", "pushing"])
def test_the_prompts_of_a_lost_server_go_to_the_others(
    when: str, push: str, servers: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = servers
    model, sampling, urls = tiny(), Sampling(6), [first.url, second.url]
    rollout = connect(first, tmp_path, urls=urls, push=push, start_timeout=20, retries=0)
    rollout.generate(model, RolloutRequest(PROMPTS, 2, sampling, KEYS))
    second.stop()
    for step in range(2):
        if when == "pushing" or step:
            change(model)
        told: list[int] = []
        out = rollout.generate(
            model, RolloutRequest(PROMPTS, 2, sampling, KEYS, lambda places, _, told=told: told.extend(places))
        )
        own = TransformersRollout(0, [1]).generate(
            model, RolloutRequest(PROMPTS, 2, sampling, [key >> 1 for key in KEYS])
        )
        assert torch.equal(out.completion_ids, own.completion_ids) and sorted(told) == [0, 1, 2]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vdr: ")]
    assert len(said) == 1 and said[0].startswith(f"vdr: vLLM server {urls[1]} does not answer /")
    assert said[0].endswith("; its prompts go to the other server for the rest of the run")
    first.stop()
    with pytest.raises(MachineError, match=f"vLLM server {urls[0]} does not answer .*is it running"):
        rollout.generate(model, RolloutRequest(PROMPTS, 2, sampling, KEYS))


def test_a_proxy_does_not_stand_before_a_server(fake_vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"{fake_vllm.url}/health")  # the way that a proxy bars
    assert VllmClient(fake_vllm.url, push_timeout=5.0)._call("GET", "/health", None, 5.0) == {}
