import signal
import sys

import pytest

from vdr_cli.launch.runner import Heard


@pytest.mark.parametrize(
    ("script", "code"), [("", 0), ("raise SystemExit(3)", 3), ("import time; time.sleep(60)", 137)]
)
def test_the_end_by_a_signal_is_an_exit_code(script: str, code: int) -> None:
    process = Heard([sys.executable, "-c", script])
    if code == 128 + signal.SIGKILL:
        process.kill()
    assert process.wait() == process.returncode == code
