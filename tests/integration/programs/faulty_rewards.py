"""Reward functions that fail, hang, or end the process they run in."""

import ctypes
import os
import signal
import time


def raising_on_rank_1(completions, **_):
    if os.environ["RANK"] == "1":
        raise ValueError("no\nparser")
    return [1.0] * len(completions)


def killing_rank_1(completions, **_):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return [1.0] * len(completions)


def exiting_on_rank_1(completions, **_):
    if os.environ["RANK"] == "1":
        raise SystemExit(0)
    return [1.0] * len(completions)


def interrupting_on_rank_1(completions, **_):
    if os.environ["RANK"] == "1":
        raise KeyboardInterrupt
    return [1.0] * len(completions)


def leaving_rank_1(completions, **_):
    if os.environ["RANK"] == "1":
        ctypes.CDLL(None)._exit(0)
    return [1.0] * len(completions)


def pooled(completions, **_):
    import multiprocessing

    with multiprocessing.get_context("fork").Pool(2) as pool:
        return [float(length) for length in pool.map(len, completions)]


def short(completions, **_):
    return [1.0]


def not_a_number(completions, **_):
    return [1.0] * (len(completions) - 1) + [float("nan")]


def hanging(completions, **_):
    time.sleep(1000)


def needs_gold(completions, gold, **_):
    return [1.0] * len(completions)
