"""An environment in plain text, or the embedded game, with one fault. FAULT says which, CALLS after how many calls."""

import os
import signal
import time
from pathlib import Path

from vdr_cli.beds.guess import Guess

FAULT, CALLS = os.environ["FAULT"], int(os.environ["CALLS"])
calls = 0


def strike(here):
    """The fault planted here, once so many calls were made."""
    global calls
    calls += 1
    if here != FAULT.partition(" ")[0] or calls <= CALLS:
        return None
    what = FAULT.partition(" ")[2]
    if what == "raises":
        raise ValueError("planted\nfault")
    if what == "hangs":
        time.sleep(1000)
    if what == "exits":
        os._exit(0)
    if what == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    return 7


class Echo:
    def reset(self, **columns):
        self.turns = 0
        return strike("reset")

    def respond(self, messages):
        self.turns += 1
        return strike("respond") or (" 1 " if self.turns < 2 else None)

    def get_reward(self):
        return float(self.turns)

    def close(self):
        with Path(os.environ["CLOSED"]).open("a") as file:
            file.write("closed\n")


class Killed(Guess):
    """The game, whose process is killed in the middle of a game."""

    def guess(self, number: int) -> str:
        """Guess the hidden number.

        Args:
            number: The guess.
        """
        strike("guess")
        return super().guess(number)
