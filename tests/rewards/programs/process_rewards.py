"""Rewards for processes of their own: right, wrong, endless and deadly ones."""

import ctypes
import os
import re
import time

import numpy as np


def plain(completions, answer, trainer_state):
    return [
        None if len(c) == 1 else float(a + len(c) + trainer_state.global_step)
        for c, a in zip(completions, answer, strict=True)
    ]


def array(completions, **_):
    return np.arange(len(completions), dtype=np.float32)


def around(**columns):
    return later(**columns)


async def later(completions, **_):
    return [float(len(c)) for c in completions]


def fails(answer, **_):
    return [{70: 1.0}[a] for a in answer]


def leaves(**_):
    raise SystemExit(3)


def words(completions, **_):
    return ["good"] * len(completions)


def local(completions, **_):
    return [lambda: 1.0] * len(completions)


def runaway(completions, **_):
    return [len(re.findall("(a+)+$", "a" * 60 + "!")) for _ in completions]


def crashes(answer, **_):
    if 120 in answer:
        ctypes.string_at(0)
    return [1.0] * len(answer)


def where(completions, **_):
    time.sleep(0.3)
    return [float(os.getpid())] * len(completions)


def ends(completions, **_):
    os._exit(0)


fallen = lambda completions, **_: [1.0] * len(completions)  # noqa: E731  a user's file
