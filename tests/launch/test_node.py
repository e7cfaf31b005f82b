"""DeepSpeed's node launcher lets its ranks hear a signal, and still ends them once nobody is above it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vdr_cli.launch.node import orphans_only, show_own_gpus


def test_handlers_act_only_without_the_parent() -> None:
    installed: dict[int, Any] = {}
    heard: list[int] = []

    def handler(number: int, _: Any) -> None:
        heard.append(number)

    for parent in (os.getppid(), os.getppid() + 1):
        install = orphans_only(lambda number, act: installed.update({number: act}), parent)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            install(number, handler)
        for number in installed:
            installed[number](number, None)
        if parent == os.getppid():
            assert heard == [signal.SIGUSR1]
    assert heard == [signal.SIGUSR1, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]


@pytest.mark.parametrize(
    ("visible", "slots", "shown"),
    [
        ("2,3", [0, 1], "2,3"),
        ("4,5,6,7", [1, 3], "5,7"),
        ("GPU-8a", [0], "GPU-8a"),
        ("", [0, 1], ""),
        ("7", [0, 1], "7"),
    ],
)
def test_ranks_see_the_gpus_that_the_launcher_sees(
    visible: str, slots: list[int], shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    environ: dict[str, str] = {}
    show_own_gpus(environ, slots)
    assert environ == {"CUDA_VISIBLE_DEVICES": shown}


@pytest.mark.parametrize("given", ["", "2,3"])
def test_the_launcher_hands_down_what_the_user_hides(given: str, tmp_path: Path) -> None:
    from vdr_cli.launch.commands import Target, node_command
    from vdr_cli.launch.environment import free_port

    (tmp_path / "rank.py").write_text("import os; print('sees', os.environ['CUDA_VISIBLE_DEVICES'])")
    command = node_command(Target(()), {"localhost": [0]}, 0, "127.0.0.1", free_port())
    command[command.index("--module") :] = [str(tmp_path / "rank.py")]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": given}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert f"sees {given[:1]}\n" in ended.stdout


PROGRAMS = Path(__file__).parent / "programs"
RANK = (PROGRAMS / "saving_rank.py").read_text(encoding="utf-8")


def test_a_signal_to_every_process_lets_the_rank_save(tmp_path: Path) -> None:
    from vdr_cli.launch.commands import Target, node_command
    from vdr_cli.launch.environment import free_port

    (tmp_path / "rank.py").write_text(RANK)
    command = node_command(Target((str(tmp_path),)), {"localhost": [0]}, 0, "127.0.0.1", free_port())
    at = command.index("--module")
    command[at : at + 2] = [str(tmp_path / "rank.py")]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    launcher = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(launcher.pid, signal.SIGTERM)
    assert launcher.wait(30) == 0
    assert (tmp_path / "saved").exists()


STOPPING = (PROGRAMS / "stopping.py").read_text(encoding="utf-8")


def test_one_signal_may_come_several_ways_and_a_second_one_stops_at_once() -> None:
    def ends(*pauses: str) -> int:
        return subprocess.run([sys.executable, "-c", STOPPING, *pauses], check=False).returncode

    assert ends("0", "0.1") == signal.SIGTERM  # it went on to its end
    assert ends("0", "1.2") == 128 + signal.SIGTERM
