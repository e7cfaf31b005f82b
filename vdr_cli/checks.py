"""Checks of the whole configuration, before a process is started or a weight is loaded. No torch, no files left."""

from __future__ import annotations

import importlib.util
import secrets
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from vdr_cli.beds.gym import is_suite
from vdr_cli.beds.registry import reward_of
from vdr_cli.config.load import computed_settings, validate
from vdr_cli.config.paths import checked_path
from vdr_cli.config.schema import Config
from vdr_cli.config.yaml_text import parse_document
from vdr_cli.data.sources import check_data, check_options, check_subset, has_no_splits
from vdr_cli.engine.ds_config import read_ds_config
from vdr_cli.errors import ConfigError, MachineError, VdrError
from vdr_cli.models.paths import resolve_model_path
from vdr_cli.rewards.loading import check_name, check_reward
from vdr_cli.system.writers import LOCK, only_writer

CHANGEABLE_ON_RESUME = {
    "train.steps",
    "train.max_seconds",
    "train.max_sampled_tokens",
    "train.checkpoint_every",
    "train.keep_last",
    "train.keep_best",
    "train.save_model",
    "train.eval_every",
    "train.eval_prompts",
    "train.eval_samples",
    "train.max_refused_steps",
    "train.micro_batch_size",
    "engine.sequence_parallel",
    "rollout.batch_tokens",
    "rollout.tool_timeout",
    "rollout.vllm.urls",
    "rollout.vllm.python",
    "rollout.vllm.push",
    "rollout.vllm.directory",
    "rollout.vllm.start_timeout",
    "rollout.vllm.request_timeout",
    "rollout.vllm.retries",
    "rollout.vllm.tolerance",
    "rewards.timeout",
    "rewards.processes",
    "data.eval_name",
    "data.eval_split",
}
"""Settings that a resumed run may change: how long, how often, in which pieces; never what a step computes."""


def default_output() -> str:
    """runs/<date>-<time>-<4 hex digits>, to be decided once for all processes of a run.

    The digits keep runs apart that a script starts in the same second.
    """
    return time.strftime("runs/%Y%m%d-%H%M%S-") + secrets.token_hex(2)


def check_before_start(config: Config, resume: str | None) -> None:
    """Everything below that is the same on every process. Raises VdrError, one line."""
    resolve_model_path(config.model.name, "model.name")
    check_data(config.data.name, "data.name", config.data.prompt_column)
    if config.train.eval_every:
        check_data(config.data.eval_name or config.data.name, "data.eval_name", config.data.prompt_column)
        check_held_out(config)
    check_options(config.data)
    check_subset(config.data)
    read_ds_config(config.engine.ds_config)
    check_rewards(config)
    check_turns(config)
    check_bonus(config)
    check_extras(config)
    check_resume(config, resume)


def check_processes(config: Config, processes: int) -> None:
    """Every rank must hold at least one group of a step, and be one of a whole sequence group."""
    if refused := config.refused_processes(processes):
        raise ConfigError(refused)


def check_held_out(config: Config) -> None:
    """Held-out prompts need a place of their own where the data have no splits."""
    name = config.data.name
    if config.data.eval_name is None and not is_suite(name) and has_no_splits(Path(name)):
        raise ConfigError(
            f"train.eval_every is {config.train.eval_every} but data.name {config.data.name} has no splits; give "
            "data.eval_name, the held-out data"
        )


def check_resume(config: Config, resume: str | None) -> None:
    """A checkpoint given by path must be there, and of this model and engine; `auto` may find none."""
    if resume in (None, "auto"):
        return
    path = checked_path(str(resume), "--resume").absolute()
    if not path.is_dir():
        raise ConfigError(f"--resume {resume}: no such checkpoint directory; give its path, or auto for the newest one")
    if (path / "config.yaml").is_file():
        raise ConfigError(f"--resume {resume}: a run directory; give --output {resume} --resume auto")
    theirs = path.parent.parent / "config.yaml"
    if theirs.is_file():
        changed = differing_keys(_computed_by(theirs), computed_settings(config))
        other = [key for key in changed if key.startswith(("model.", "engine.")) and key not in CHANGEABLE_ON_RESUME]
        if other:
            raise ConfigError(
                f"--resume {resume}: {_few(other)} in its run ({theirs}); "
                "a checkpoint resumes only with the model and engine settings it was saved with"
            )


def check_rewards(config: Config) -> None:
    """Raise ConfigError for a name that cannot be a reward's, a missing file, or a run without any reward.

    Beds, suites and environments bring their own.
    """
    for function in config.rewards.functions:
        check_reward(function)
    if not config.rewards.functions and reward_of(config.data.name) is None and config.rollout.environment is None:
        raise ConfigError(
            f"rewards.functions is empty and data.name {config.data.name} has no reward of its own; "
            "give --reward a built-in, module:function, file.py:function or model:PATH"
        )


def check_turns(config: Config) -> None:
    """Raise ConfigError for a name that cannot be an environment's, a tool's or a parser's, and for a missing file."""
    cfg = config.rollout
    for tool in cfg.tools:
        check_name(tool, "rollout.tools")
    if cfg.environment is not None:
        check_name(cfg.environment, "rollout.environment")
    if cfg.tool_parser not in ("auto", "hermes", "llama3", "mistral"):
        check_name(cfg.tool_parser, "rollout.tool_parser")


def check_bonus(config: Config) -> None:
    """Raise ConfigError for a bonus function that cannot be one by its name, and for a missing file."""
    given = {"bonus.source": config.bonus.source, "bonus.answer": config.bonus.answer or ""}
    for key, name in given.items():
        if ":" in name:
            check_name(name, key)


def check_extras(config: Config) -> None:
    """Optional packages that the settings ask for must be installed."""
    wanted = {"observe.wandb": ("wandb", config.observe.wandb), "model.lora": ("peft", config.model.lora is not None)}
    for key, (package, is_wanted) in wanted.items():
        if is_wanted and importlib.util.find_spec(package) is None:
            raise ConfigError(f"{key} needs {package}: pip install {package}")


def check_output(config: Config, resume: str | None) -> None:
    """The run directory can be written and does not hold another run, nor this one without --resume.

    For one process alone: once a run has started, its directory holds it.
    """
    if config.train.output is None:
        return
    directory = Path(config.train.output)
    _check_writable(directory)
    earlier = directory / "config.yaml"
    if not earlier.is_file():
        _refuse_leftovers(directory, resume)
        return
    if (directory / LOCK).exists():
        with only_writer(directory):  # tried, and let go again
            pass
    theirs = _computed_by(earlier)
    changed, hard = differing_keys(theirs, computed_settings(config)), changed_for_good(theirs, config)
    if resume is None:
        whose = f"another run ({_few(changed)})" if changed else "this run already"
        help_text = "give another --output" if hard else "continue it with --resume auto, or give another --output"
        raise ConfigError(f"train.output {directory} holds {whose}; {help_text}")
    if hard:
        raise ConfigError(
            f"train.output {directory} holds a run with other settings ({_few(hard)}); resume with those in "
            f"{earlier}, or give another --output"
        )
    own = directory / "checkpoints"
    is_own = resume == "auto" or checked_path(resume, "--resume").resolve().parent == own.resolve()
    if not is_own and any(own.glob("step_*")):
        raise ConfigError(
            f"train.output {directory} holds a run with checkpoints, and --resume {resume} is not one of them; "
            "continue it with --resume auto, or give another --output"
        )


def changed_for_good(theirs: Mapping[str, Any], config: Config) -> list[str]:
    """Keys in which a run's settings so far differ from these, and which a resumed run may not change."""
    changed = differing_keys(theirs, computed_settings(config))
    return [key for key in changed if key not in CHANGEABLE_ON_RESUME or _balances(config, key)]


def refuse_other_settings_of(checkpoint: Path, tree: Mapping[str, Any], config: Config) -> None:
    """Raise ConfigError when a checkpoint of this run was written with settings (a tree) that must not change.

    The run's config.yaml, which is compared before the start, may have been edited since, or lost.
    """
    changed = changed_for_good(_computed_from(tree), config)
    if changed:
        raise ConfigError(
            f"--resume {checkpoint}: {_few(changed)} in what it was written with; resume with the same settings, or "
            "start a new run with another --output"
        )


def refuse_other_model_of(checkpoint: Path, tree: Mapping[str, Any], config: Config) -> None:
    """Raise ConfigError when another run's checkpoint, written with these settings (a tree), does not fit this run.

    A model that has moved with its directory is the same. Checkpoints of other versions are not judged.
    """
    theirs, ours = _computed_from(tree), computed_settings(config)
    if not theirs:
        return
    keys = [key for key in differing_keys(theirs, ours) if key.startswith(("model.", "engine."))]
    other = [key for key in keys if key not in CHANGEABLE_ON_RESUME]
    if Path(theirs["model"]["name"]).name == Path(ours["model"]["name"]).name:
        other = [key for key in other if key != "model.name"]
    if theirs["train"]["optimizer"] != ours["train"]["optimizer"]:
        other.append("train.optimizer")
    if bool(theirs["train"]["weight_decay"]) != bool(ours["train"]["weight_decay"]):  # it decides what is a group
        other.append("train.weight_decay")
    if other:
        raise ConfigError(
            f"--resume {checkpoint}: {_few(other)} in what it was written with; a checkpoint resumes only with the "
            "model, engine and optimizer it was saved with"
        )


def differing_keys(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two trees of settings."""
    keys: list[str] = []
    for name in dict.fromkeys((*ours, *theirs)):
        a, b = ours.get(name), theirs.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            keys += differing_keys(a, b, f"{prefix}{name}.")
        elif a != b:
            keys.append(f"{prefix}{name}")
    return keys


def _balances(config: Config, key: str) -> bool:
    """True where the load-balancing loss, which is that of a micro-batch, depends on this setting."""
    return key == "train.micro_batch_size" and config.grpo.router_aux_loss_coef > 0


def _refuse_leftovers(directory: Path, resume: str | None) -> None:
    """A run's results without its settings: nothing says whose they are."""
    left = [name for name in ("metrics.jsonl", "checkpoints", "completions") if (directory / name).exists()]
    if left and resume is None:
        raise ConfigError(
            f"train.output {directory} holds {' and '.join(left)} of a run whose config.yaml is gone; "
            "give another --output"
        )


def _computed_by(path: Path) -> Mapping[str, Any]:
    """The settings in a run's config.yaml; a file that is not one counts as another run's."""
    try:
        return _computed_from(parse_document(path.read_text(encoding="utf-8"), str(path)).tree)
    except (OSError, UnicodeDecodeError, VdrError, yaml.YAMLError):
        return {}


def _computed_from(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of a tree, complete; none where it is not one of this version."""
    try:
        return computed_settings(validate(dict(tree)))
    except VdrError:
        return {}


def _few(keys: list[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(keys[:3]) + more + (" differ" if len(keys) > 1 else " differs")


def _check_writable(directory: Path) -> None:
    """Without creating it: the directory, or the nearest parent that exists, must let us write."""
    existing = directory.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise MachineError(f"train.output {directory}: {existing} is a file; give a directory")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise MachineError(
            f"train.output {directory}: cannot write in {existing} ({error.strerror}); choose another --output"
        ) from None
