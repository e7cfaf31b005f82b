"""Rewards that answer, fail, leave or die."""

import os
import sys


def length(completions, **_):
    return [float(len(text)) for text in completions]


async def waits(completions, **_):
    return [0.5] * len(completions)


def leaves(completions, **_):
    sys.exit(3)


def fails(completions, **_):
    raise ValueError("no such answer")


def dies(completions, **_):
    os.kill(os.getpid(), 9)


def process(completions, **_):
    return [float(os.getpid())] * len(completions)
