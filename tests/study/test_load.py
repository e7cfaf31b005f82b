"""Study files: what is refused in one line before anything runs, and what each run's settings are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vdr_cli.errors import ConfigError
from vdr_cli.study.load import load_study, warnings

FILE = """\
output: {folder}
base:
  train: {{prompts_per_step: 5}}
  rollout.group_size: 4
arms:
  grpo: {{disagreement.mode: none}}
  default: {{}}
  per_token:
    disagreement: {{mode: per_token}}
control: grpo
seeds: 4
budget: {{steps: 40}}
evaluation: {{prompts: 16, samples: 64}}
"""


@pytest.fixture
def written(tmp_path: Path) -> Any:
    def write(old: str = "", new: str = "") -> Path:
        text = FILE.format(folder=tmp_path / "study")
        assert old in text
        (tmp_path / "study.yaml").write_text(text.replace(old, new) if old else text + new)
        return tmp_path / "study.yaml"

    return write


def refused(path: Path) -> str:
    with pytest.raises(ConfigError) as error:
        load_study(path)
    message = str(error.value)
    assert "\n" not in message and error.value.exit_code == 2
    return message.replace(str(path), "study.yaml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "mode: per_token",
            "mode: per_token, wieght: 0.3",
            "study.yaml:9 (per_token): disagreement.wieght is not a setting; did you mean bonus.weight?",
        ),
        ("default: {}", "default: {train.stepz: 3}", "study.yaml:7 (default): train.stepz is not a setting"),
        ("default: {}", "default: {disagreement.mode: none}", "arms.default: the same settings as grpo"),
        ("default: {}", "default: {train.seed: 3}", "arms.default: train.seed is the study's; it sets it from `seeds`"),
        ("default: {}", "default: {train.steps: 3}", "train.steps is the study's; it sets it from `budget`"),
        ("default: {}", "default: {train.save_model: false}", "train.save_model is the study's"),
        ("default: {}", "de/fault: {}", "arms.de/fault: names a directory"),
        ("default: {}", "GRPO: {}", "differs from grpo in case only"),
        ("control: grpo", "control: gropo", "study.yaml:10: control: gropo is not an arm; there are grpo, default"),
        ("control: grpo\n", "", "control is required"),
        ("seeds: 4", "sedes: 4", "study.yaml:11: sedes is not a setting; did you mean seeds?"),
        ("seeds: 4", "seeds: none", "seeds: give how many, or a list"),
        ("seeds: 4", "seeds: true", "seeds: give how many, or a list"),
        ("seeds: 4", "seeds: [1, 2, 1]", "seeds: 1 is given twice"),
        ("seeds: 4", "seeds: []", "study.yaml:11: seeds: give at least one seed"),
        (
            "seeds: 4",
            "tuning: {seeds: [], trials: {grpo: [{}], default: [{}], per_token: [{}]}}",
            "study.yaml:11: tuning.seeds: give at least one seed",
        ),
        (
            "seeds: 4",
            "contrasts: [[grpo, default, per_token]]",
            "contrasts[0]: give two arms, such as [bald, permuted]",
        ),
        ("seeds: 4", "contrasts: [[grpo]]", "contrasts[0]: give two arms"),
        ("seeds: 4", "contrasts: [grpo, default]", "contrasts[0]: give two arms"),
        (
            "seeds: 4",
            "contrasts: [[default, grpo], [grpo, default], [default, grpo]]",
            "study.yaml:11: contrasts: [default, grpo] is given twice; keep one",
        ),
        ("seeds: 4", "secondary: [area, pass@1, area]", "study.yaml:11: secondary: area is given twice; keep one"),
        ("seeds: 4", "contrasts: [[grpo, bald]]", "contrasts.0: bald is not an arm; there are grpo, default"),
        ("seeds: 4", "contrasts: [[grpo, grpo]]", "contrasts.0: grpo against itself"),
        ("seeds: 4", "endpoint: pas@64", "endpoint: nothing computes pas@64; did you mean pass@64?"),
        ("seeds: 4", "endpoint: pass@65", "pass@65 needs 65 completions per problem and evaluation.samples is 64"),
        ("seeds: 4", "secondary: [clases]", "secondary.0: nothing computes clases; did you mean classes?"),
        ("{steps: 40}", "{steps: 40, seconds: 3}", "budget: give exactly one of steps, seconds and sampled_tokens"),
        ("{steps: 40}", "{}", "budget: give exactly one of"),
        (
            "seeds: 4",
            "tuning: {seeds: [100], trials: {grpo: [{}], default: [{}, {}], per_token: [{}]}}",
            "every arm gets the same number of trials; here: grpo 1, default 2, per_token 1",
        ),
        (
            "seeds: 4",
            "tuning: {seeds: [3], trials: {grpo: [{}], default: [{}], per_token: [{}]}}",
            "tuning.seeds: 3 is also one of seeds",
        ),
        (
            "seeds: 4",
            "tuning: {seeds: [99], trials: {grpo: [{}], default: [{}], per_token: [{grpo.bta: 1}]}}",
            "study.yaml:11 (per_token): grpo.bta is not a setting; did you mean grpo.beta?",
        ),
        ("{steps: 40}", "{seconds: 60}\nx: 1", "x is not a setting"),
    ],
)
def test_a_study_that_cannot_answer_is_refused(written: Any, old: str, new: str, message: str) -> None:
    assert message in refused(written(old, new))


def test_a_schedule_needs_steps_to_go_by(written: Any) -> None:
    path = written("default: {}", "default: {train.lr_schedule: linear}")
    path.write_text(path.read_text().replace("{steps: 40}", "{seconds: 60}"))
    assert "arms.default: train.lr_schedule follows steps, and the budget is not in steps" in refused(path)
    path.write_text(path.read_text().replace("train.lr_schedule: linear", "grpo.num_iterations: 3"))
    assert load_study(path).config("starter", "default", 0).train.steps % 3 == 0
    path.write_text(path.read_text().replace("base:", "base:\n  train.steps: 501"))
    train = load_study(path).config("starter", "default", 0).train
    assert (train.steps, train.max_seconds, train.max_sampled_tokens) == (501, 60.0, None)


def test_a_runs_settings_come_from_base_bed_arm_trial_and_study(written: Any) -> None:
    path = written(
        "seeds: 4",
        "seeds: 4\nbeds: {small: {rollout.max_new_tokens: 6}}\n"
        "tuning: {seeds: [9], trials: {grpo: [{}], default: [{grpo.beta: 0.5}], per_token: [{}]}}",
    )
    study = load_study(path)
    config = study.config("small", "default", seed=3, trial=0)
    assert (config.train.seed, config.train.steps, config.train.prompts_per_step) == (3, 40, 5)
    assert (config.rollout.group_size, config.rollout.max_new_tokens, config.grpo.beta) == (4, 6, 0.5)
    assert config.train.learning_rate == 1e-4  # the starter's recipe
    assert study.config("small", "default", seed=3).grpo.beta == 0.0
    assert study.arms == ["grpo", "default", "per_token"] and study.comparisons == 2


def test_few_seeds_are_a_warning_with_the_detectable_difference(written: Any) -> None:
    (line,) = warnings(load_study(written()))
    assert "with 4 seeds and 2 comparisons" in line and "2.58 times" in line and "13 seeds find one of 1.0" in line
    assert warnings(load_study(written("seeds: 4", "seeds: 20"))) == []
    (line,) = warnings(load_study(written("seeds: 4", "seeds: 1")))
    assert "without intervals" in line
