"""A supervisor in the directory argv[1] with a rank that saves when it is signalled."""

import os
import sys
from pathlib import Path

from vdr_cli.launch.supervisor import Plan, supervise

rank = """
import os, pathlib, signal, sys, time
saved = pathlib.Path(sys.argv[1], "saved")
def stop(number, frame):
    saved.write_text(str(number))
    sys.exit(128 + number)
signal.signal(signal.SIGINT, stop); signal.signal(signal.SIGTERM, stop)
saved.with_name("ready").write_text("")
time.sleep(60)
"""
environment = {**os.environ, "RANK": "0"}
plan = Plan(lambda a: [sys.executable, "-c", rank, sys.argv[1]], environment, Path(sys.argv[1]), False, 5.0)
sys.exit(supervise(plan, [], 3, print))
