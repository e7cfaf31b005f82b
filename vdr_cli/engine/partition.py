"""ZeRO-3's partitioned parameters: loading each rank's shard, and making parameters whole."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from vdr_cli.engine.deepspeed_import import deepspeed
from vdr_cli.engine.ds_config import DsConfig, zero_stage
from vdr_cli.engine.gathered import Gather


def gather(parameters: list[nn.Parameter], writer: int | None = None) -> AbstractContextManager[Any]:
    """All of these parameters whole on every rank, in one coalesced all-gather; released on exit. Collective.

    writer: the rank whose changes inside the block every rank keeps; None: changes are lost.
    """
    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=writer)  # type: ignore[no-any-return]


def gather_to_read(ds_config: DsConfig) -> Gather | None:
    """`gather` for readers; None below ZeRO-3, where parameters are whole."""
    return gather if zero_stage(ds_config) == 3 else None


def gather_to_write(ds_config: DsConfig) -> Gather | None:
    """`gather` for changes that every rank makes alike; None below ZeRO-3, where parameters are whole."""
    return (lambda parameters: gather(parameters, writer=0)) if zero_stage(ds_config) == 3 else None


def sharded_loading(ds_config: DsConfig) -> AbstractContextManager[Any]:
    """While open, from_pretrained gives each rank its shard (ZeRO-3)."""
    return _ZeroInit(ds_config) if zero_stage(ds_config) == 3 else nullcontext()


class _ZeroInit:
    """Keeps an HfDeepSpeedConfig alive while a model is loaded, not longer: transformers refers to it weakly."""

    def __init__(self, ds_config: DsConfig) -> None:
        self._ds_config = ds_config

    def __enter__(self) -> None:
        from transformers.integrations import HfDeepSpeedConfig

        self._kept_alive = HfDeepSpeedConfig(self._ds_config)

    def __exit__(self, *_: object) -> None:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
        del self._kept_alive
