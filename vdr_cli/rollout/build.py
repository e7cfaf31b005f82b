"""The backend that a configuration names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vdr_cli.config import RolloutConfig
from vdr_cli.rollout.base import LayeredWeights, Rollout
from vdr_cli.rollout.transformers_backend import TransformersRollout


@contextmanager
def open_rollout(
    config: RolloutConfig,
    tokenizer: Any,
    eos_ids: Sequence[int],
    run_directory: Path,
    main: bool,
    layered: LayeredWeights | None = None,
) -> Iterator[Rollout]:
    """The backend; whatever it started is stopped on leaving.

    run_directory: holds vllm/ unless rollout.vllm.directory says otherwise. main: rank 0. layered: for a model whose
    weights are gathered layer by layer; the backend is then vllm.
    """
    if config.backend == "transformers":
        yield TransformersRollout(tokenizer.pad_token_id, eos_ids, tokenizer, config.batch_tokens, config.cuda_graphs)
        return
    from vdr_cli.rollout.vllm_backend import VllmRollout

    directory = Path(config.vllm.directory) if config.vllm.directory else run_directory / "vllm"
    rollout = VllmRollout(config, tokenizer, tokenizer.pad_token_id, eos_ids, directory, main, layered)
    try:
        yield rollout
    finally:
        rollout.close()
