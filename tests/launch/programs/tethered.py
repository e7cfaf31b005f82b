"""Start the program argv[1] on a tether, in the directory argv[2]."""

import os
import sys
import time

from vdr_cli.system import processes

tether = [sys.executable, "-m", "vdr_cli.launch.tether"]
command = [*tether, sys.executable, "-c", sys.argv[1], "vdr_cli.launch.runner"]
processes.start([*command, sys.argv[2]], os.environ)
time.sleep(60)
