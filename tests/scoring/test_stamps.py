"""Files that scores depend on: a change of one of them is another request."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from vdr_cli.config import RewardsConfig
from vdr_cli.errors import ConfigError
from vdr_cli.scoring.stamps import reward_stamps, weights_stamp


def rewards(*names: str) -> RewardsConfig:
    return RewardsConfig.model_validate({"functions": [{"name": name} for name in names]})


def touch(path: Path, seconds: int) -> None:
    os.utime(path, (seconds, seconds))


def test_an_adapter_counts_beside_its_base(tmp_path: Path) -> None:
    settings = {"peft_type": "LORA", "base_model_name_or_path": "starter"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(b"x")
    before = weights_stamp(str(tmp_path))
    assert before is not None and before.startswith(str(weights_stamp("starter")))
    touch(weights, 7)
    assert weights_stamp(str(tmp_path)) != before
    assert weights_stamp("some/model") is None


def test_reward_files_modules_and_models_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = [tmp_path / "rw.py", tmp_path / "pack" / "inner.py", tmp_path / "judge" / "config.json"]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text("raise SystemExit")  # nothing is imported
    names = ("rw.py:f", "pack.inner:f", f"model:{tmp_path / 'judge'}")
    before = reward_stamps(rewards("countdown", *names))
    assert tuple(before) == names
    for file, name in zip(files, names, strict=True):
        touch(file, 7)
        after = reward_stamps(rewards(*names))
        assert [key for key in names if before[key] != after[key]] == [name]
        before = after


def test_rewards_without_files_have_no_stamp() -> None:
    assert reward_stamps(None) == {}
    assert reward_stamps(rewards("countdown", "no_such_module_here:f", "json.nothing:f", "model:some/judge")) == {}
    with pytest.raises(ConfigError, match=r"rewards.functions model: ./nowhere: no such directory"):
        reward_stamps(rewards("model:./nowhere"))
