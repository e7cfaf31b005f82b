"""A real DeepSpeed engine in the test's own process: one rank, a tiny random model."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vdr_cli.config import Config
from vdr_cli.engine.build import build_engine
from vdr_cli.engine.engine import Engine
from vdr_cli.engine.processes import start_distributed
from vdr_cli.samples import Completions


@pytest.fixture(scope="session")
def device() -> Iterator[torch.device]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with pytest.MonkeyPatch.context() as session:
        session.setenv("LOCAL_RANK", "0")  # DeepSpeed asks for it whenever it builds an engine
        with session.context() as joining:  # no longer: what later tests start must not take itself for this rank
            for name, value in place.items():
                joining.setenv(name, str(value))
            device = start_distributed()
        yield device
    torch.distributed.destroy_process_group()


def saved_model(folder: Path, kind: str, scale: float, **settings: Any) -> Path:
    """A directory with a random model of two layers, whose weights are large enough for real gradients."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=41, num_hidden_layers=2, **settings)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 with dropout in its configuration."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    more = {"tie_word_embeddings": True, "attention_dropout": 0.3}
    return saved_model(tmp_path_factory.mktemp("tiny"), "qwen2", 0.1, **shape, **more)


@pytest.fixture
def build(device: torch.device, tiny_path: Path, tmp_path: Path) -> Callable[..., Engine]:
    """build(stage=3, grad_norm=1.0, **sections): an engine of the tiny model."""

    def make(stage: int = 3, max_grad_norm: float = 1.0, **sections: Any) -> Engine:
        return build_engine(config_of(tiny_path, tmp_path, stage, max_grad_norm, **sections), device)

    return make


@pytest.fixture
def config(tiny_path: Path, tmp_path: Path) -> Callable[..., Config]:
    """The configuration that `build` uses."""

    def make(stage: int = 3, max_grad_norm: float = 1.0, **sections: Any) -> Config:
        return config_of(tiny_path, tmp_path, stage, max_grad_norm, **sections)

    return make


def config_of(tiny_path: Path, tmp_path: Path, stage: int, max_grad_norm: float, **sections: Any) -> Config:
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": "auto"}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": "auto"}
    ds_config = tmp_path / f"ds_{stage}.json"
    ds_config.write_text(json.dumps({"zero_optimization": zero}))
    model = {"name": str(tiny_path), "dtype": "float32", **sections.pop("model", {})}
    train = {"max_grad_norm": max_grad_norm, **sections.pop("train", {})}
    return Config(model=model, train=train, engine={"ds_config": str(ds_config)}, **sections)


@pytest.fixture
def completions() -> Completions:
    """Two groups of two; prompts and completions of different lengths."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, 41, (2, 5), generator=generator).repeat_interleave(2, dim=0)
    prompt_mask = torch.ones_like(prompts, dtype=torch.bool)
    prompt_mask[2:, :2] = False
    ids = torch.randint(3, 41, (4, 6), generator=generator)
    mask = torch.arange(6)[None] < torch.tensor([6, 2, 1, 4])[:, None]
    return Completions(prompts, prompt_mask, ids, mask, torch.zeros(4, 6), torch.zeros(4, dtype=torch.bool))


@pytest.fixture
def one_step() -> Callable[..., Any]:
    """one_step(engine, completions, poison=1.0): forward, backward, step; returns (log-probabilities, result)."""

    def run(engine: Engine, batch: Completions, poison: float = 1.0, learning_rate: float = 1e-2) -> Any:
        logps, _ = engine.forward(*tokens(batch), 0.7)
        engine.backward(-(logps * batch.completion_mask).sum() * poison, last=True)
        return logps.detach(), engine.step(learning_rate)

    return run


def tokens(batch: Completions) -> tuple[torch.Tensor, ...]:
    return batch.prompt_ids, batch.prompt_mask, batch.completion_ids, batch.completion_mask
