"""Signal itself after each of these pauses, in seconds, inside StopSignal."""

import os
import signal
import sys
import time

from vdr_cli.system import stopping

stopping.this_is_a_command()
with stopping.StopSignal() as stop:
    for pause in map(float, sys.argv[1:]):
        time.sleep(pause)
        os.kill(os.getpid(), signal.SIGTERM)
    sys.exit(stop.received)
