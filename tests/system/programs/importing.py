"""Import the reward file argv[1] while signals are remembered; every further signal is a second one."""

import sys

from vdr_cli.rewards.loading import find_function
from vdr_cli.system import stopping

stopping.ONE_SIGNAL = -1.0
stopping.this_is_a_command()
with stopping.StopSignal():
    find_function(sys.argv[1])
