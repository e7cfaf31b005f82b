"""Rewards that need a main thread, or what belongs to the thread that imported them."""

import asyncio
import decimal
import signal
import sqlite3
import threading
from signal import ITIMER_REAL, setitimer

decimal.getcontext().prec = 50
database = sqlite3.connect(":memory:")
kept = threading.local()
kept.value = 1.0


def limited(texts):
    def ring(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(20)
    try:
        return [float(len(text)) for text in texts]
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def plain(completions, **_):
    return limited(completions)


def careful(completions, **_):
    try:
        return limited(completions)
    except Exception:
        return [0.0] * len(completions)


def alarm_alone(completions, **_):
    try:
        setitimer(ITIMER_REAL, 0.05)
        signal.pause()
    except Exception:
        return [0.0] * len(completions)
    return [float(len(text)) for text in completions]


async def awaited(completions, **_):
    await asyncio.sleep(0)
    return careful(completions)


def on_the_loop(completions, **_):
    async def later():
        return [float(len(text)) for text in completions]

    return asyncio.get_event_loop().run_until_complete(later())


def interrupts(completions, **_):
    asyncio.get_event_loop().add_signal_handler(signal.SIGUSR1, lambda: None)
    return [float(len(text)) for text in completions]


def from_a_database(completions, **_):
    return [float(database.execute("select length(?)", (text,)).fetchone()[0]) for text in completions]


def precise(completions, **_):
    assert decimal.getcontext().prec == 50
    return [float(len(text)) for text in completions]


def broken_there(completions, **_):
    limited(completions)
    return [{1: 1.0}[len(text)] for text in completions]
