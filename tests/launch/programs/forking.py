"""A fork after a second watchdog: the signals that are blocked in the child, then in the parent."""

import os
import signal

from vdr_cli.launch import watchdog

for _ in range(2):
    watchdog.begin()
    watchdog.end()
child = os.fork()
if child:
    os.waitpid(child, 0)
print(signal.pthread_sigmask(signal.SIG_BLOCK, ()), flush=True)
