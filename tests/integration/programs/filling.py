"""The task's reward; a full disk DISK from step FULL on, an empty one from step FREE on."""

import os
import pathlib

from vdr_cli.beds.countdown import countdown

DISK = pathlib.Path(os.environ["DISK"])


def filling(completions, trainer_state, **columns):
    step = trainer_state.global_step + 1
    if os.environ["RANK"] == "0" and int(os.environ["FULL"]) <= step < int(os.environ["FREE"]):
        with (DISK / "filler").open("ab", buffering=0) as filler:
            try:
                while filler.write(bytes(4096)):
                    pass
            except OSError:
                pass
    if os.environ["RANK"] == "0" and step == int(os.environ["FREE"]):
        (DISK / "filler").unlink(missing_ok=True)
    return countdown(completions, **columns)
