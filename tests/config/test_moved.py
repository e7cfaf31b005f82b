"""Keys that moved from disagreement to bonus: accepted everywhere, refused where they contradict."""

from __future__ import annotations

from pathlib import Path

import pytest

from vdr_cli.config.load import load_config
from vdr_cli.config.moved import MOVED
from vdr_cli.errors import ConfigError

OTHER = ["model.name=other"]
VALUES = {
    "weight": 0.3,
    "shape": "reward",
    "gate": "incorrect",
    "schedule": "linear",
    "schedule_fraction": 0.5,
    "clip": 2.0,
}


@pytest.mark.parametrize("name", VALUES)
def test_an_old_key_means_the_new_one(name: str, tmp_path: Path) -> None:
    assert MOVED[f"disagreement.{name}"] == f"bonus.{name}"
    (tmp_path / "run.yaml").write_text(f"disagreement: {{mode: per_token, {name}: {VALUES[name]}}}\n")
    from_file = load_config(tmp_path / "run.yaml", OTHER)
    assert getattr(from_file.bonus, name) == VALUES[name] and from_file.disagreement.mode == "per_token"
    assert getattr(load_config(None, [*OTHER, f"disagreement.{name}={VALUES[name]}"]).bonus, name) == VALUES[name]


def test_what_is_typed_beats_the_file_by_either_name(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text("disagreement: {weight: 0.3}\n")
    (tmp_path / "new.yaml").write_text("bonus: {weight: 0.3}\n")
    for file in ("old.yaml", "new.yaml"):
        assert load_config(tmp_path / file, OTHER, {"bonus.weight": 0.7}).bonus.weight == 0.7
        assert load_config(tmp_path / file, [*OTHER, "disagreement.weight=0.7"]).bonus.weight == 0.7


def test_two_values_for_one_setting_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("disagreement:\n  weight: 0.3\nbonus:\n  weight: 0.2\n")
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "run.yaml", OTHER)
    line = str(caught.value)
    assert "run.yaml:2: disagreement.weight is 0.3 and" in line and "run.yaml:4: bonus.weight is 0.2" in line
    assert "keep bonus.weight" in line and "\n" not in line
    same = [*OTHER, "disagreement.weight=0.3", "bonus.weight=0.3"]
    assert load_config(None, same).bonus.weight == 0.3


def test_a_bad_value_under_an_old_key_names_its_place(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("disagreement:\n  clip: 0\n")
    with pytest.raises(ConfigError, match=r"run\.yaml:2: bonus\.clip must be above 0, not 0"):
        load_config(tmp_path / "run.yaml", OTHER)


@pytest.mark.parametrize("override", ["bonus.source=none", "disagreement.mode=none"])
def test_either_switch_is_plain_grpo(override: str) -> None:
    config = load_config(None, [*OTHER, override])
    assert config.bonus_source == "none" and not config.needs_ensemble


def test_an_unknown_source_is_named_with_its_neighbour() -> None:
    with pytest.raises(ConfigError, match=r"bonus\.source is 'disagreemnt', .* did you mean disagreement\?"):
        load_config(None, [*OTHER, "bonus.source=disagreemnt"])


def test_credit_per_token_needs_a_shape_that_takes_it() -> None:
    given = [*OTHER, "disagreement.mode=per_token", "disagreement.credit=token"]
    with pytest.raises(ConfigError, match=r"bonus\.shape reward needs one number per completion"):
        load_config(None, [*given, "bonus.shape=reward"])
    assert load_config(None, [*given, "bonus.shape=plain"]).token_bonus
