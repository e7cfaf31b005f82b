"""In place of DeepSpeed's runner: a child of its own, and a handler of SIGTERM that must not run."""

import pathlib
import signal
import subprocess
import sys
import time

folder = pathlib.Path(sys.argv[2])
signal.signal(signal.SIGTERM, lambda *_: (folder / "handler ran").touch())
child = subprocess.Popen(["sleep", "60"])
(folder / "pid").write_text(str(child.pid))
(folder / "ready").touch()
time.sleep(60)
