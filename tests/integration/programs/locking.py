"""The task's reward; checkpoints that cannot be written from step LOCKED on, and can from step OPEN on."""

import os
import subprocess

from vdr_cli.beds.countdown import countdown

FOLDER, LOCKED, OPEN = (os.environ[name] for name in ("FOLDER", "LOCKED", "OPEN"))
COMMANDS = {
    int(LOCKED): [["mount", "--bind", FOLDER, FOLDER], ["mount", "-o", "remount,bind,ro", FOLDER]],
    int(OPEN): [["umount", FOLDER]],
}


def locking(completions, trainer_state, **columns):
    if os.environ["RANK"] == "0":  # rewards may be called several times in a step
        for command in COMMANDS.pop(trainer_state.global_step + 1, []):
            subprocess.run(command, check=True)
    return countdown(completions, **columns)
