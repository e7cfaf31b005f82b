"""The backend that a configuration names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vdr_cli.config import RolloutConfig
from vdr_cli.rollout.base import Rollout
from vdr_cli.rollout.transformers_backend import TransformersRollout


@contextmanager
def open_rollout(
    config: RolloutConfig, tokenizer: Any, eos_ids: Sequence[int], run_directory: Path, main: bool
) -> Iterator[Rollout]:
    """The backend, with what it started stopped on leaving.

    run_directory: holds vllm/ unless rollout.vllm.directory says otherwise. main: rank 0.
    """
    if config.backend == "transformers":
        yield TransformersRollout(tokenizer.pad_token_id, eos_ids, tokenizer, config.batch_tokens, config.cuda_graphs)
        return
    from vdr_cli.rollout.vllm_backend import VllmRollout

    directory = Path(config.vllm.directory) if config.vllm.directory else run_directory / "vllm"
    rollout = VllmRollout(config, tokenizer, tokenizer.pad_token_id, eos_ids, directory, main)
    try:
        yield rollout
    finally:
        rollout.close()
