"""The embedded task's reward for scripts/verify/fault_test.py: a reward function, so that it is loaded in every rank.

FAULT_PHASE is `rollout-3`: when that phase is entered for the third time every rank stops in it, says so in
FAULT_FOLDER, and goes on once the fault is there: the work of the phase then meets it. Unset: the reward alone.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vdr_cli.beds.countdown import countdown as task_reward

LONGEST = 60.0
"""Seconds after which a rank goes on even without a fault."""

PHASE, _, CALL = os.environ.get("FAULT_PHASE", "").partition("-")
FOLDER = Path(os.environ.get("FAULT_FOLDER", "."))
entered = 0


def reached(name: str) -> None:
    """Stop here until FAULT_FOLDER/broken is there, if this is the phase and the call."""
    global entered
    entered += name == PHASE
    if name != PHASE or entered != int(CALL):
        return
    (FOLDER / f"rank{os.environ['RANK']}").touch()
    deadline = time.monotonic() + LONGEST
    while not (FOLDER / "broken").exists() and time.monotonic() < deadline:
        time.sleep(0.02)


def countdown(completions: list[Any], numbers: list[Any], target: list[Any], **_: Any) -> list[float]:
    """The task's reward; the phase `reward` is in it."""
    reached("reward")
    return task_reward(completions, numbers=numbers, target=target)


def stopping(owner: Any, method: str, name: str) -> None:
    """Make the phase `name` begin with each call of owner.method."""
    original: Callable[..., Any] = getattr(owner, method)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        reached(name)
        return original(*args, **kwargs)

    setattr(owner, method, call)


def install() -> None:
    """Only where the run has come far enough to load rewards, so what is wrapped is what it will call."""
    from vdr_cli.engine import checkpoint
    from vdr_cli.engine.engine import Engine
    from vdr_cli.rollout.transformers_backend import TransformersRollout

    stopping(TransformersRollout, "generate", "rollout")
    stopping(Engine, "backward", "backward")
    stopping(checkpoint, "_random_states", "checkpoint")  # after DeepSpeed's files, before the manifest


if PHASE:
    install()
