"""Gathering and loading, stage by stage. With real ranks: test_gather_layer.py."""

from __future__ import annotations

import pytest
from transformers.integrations import is_deepspeed_zero3_enabled

from vdr_cli.engine.partition import gather, gather_to_read, gather_to_write, sharded_loading

STAGE_3 = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1, "train_batch_size": 1}


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_below_stage_3_parameters_are_whole(stage: int) -> None:
    config = {"zero_optimization": {"stage": stage}}
    assert gather_to_read(config) is None and gather_to_write(config) is None
    with sharded_loading(config):
        assert not is_deepspeed_zero3_enabled()


def test_changes_are_kept_only_by_the_writers_way(monkeypatch: pytest.MonkeyPatch) -> None:
    writers: list[int | None] = []
    monkeypatch.setattr(
        "vdr_cli.engine.partition.deepspeed.zero.GatheredParameters",
        lambda parameters, modifier_rank: writers.append(modifier_rank),
    )
    read, write = gather_to_read(STAGE_3), gather_to_write(STAGE_3)
    assert read is gather and write is not None
    read([])
    write([])
    assert writers == [None, 0]


def test_models_are_loaded_in_shards_inside_the_block_alone() -> None:
    with sharded_loading(STAGE_3):
        assert is_deepspeed_zero3_enabled()
    assert not is_deepspeed_zero3_enabled()
    with pytest.raises(OSError), sharded_loading(STAGE_3):
        raise OSError
    assert not is_deepspeed_zero3_enabled()
