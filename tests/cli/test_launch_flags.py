"""--num-processes and the like on eval and score, and the words that the shell completes."""

from __future__ import annotations

from pathlib import Path

import pytest

from vdr_cli.cli import app
from vdr_cli.cli.options import completion, ds_configs
from vdr_cli.config import LaunchConfig
from vdr_cli.config.load import dump_run_record, load_config
from vdr_cli.launch import reexec

COMMANDS = (["eval", "starter"], ["score", "a.jsonl", "--model", "starter"])


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[LaunchConfig, list[str]]]:
    """Launches that were asked for; nothing is started."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    asked: list[tuple[LaunchConfig, list[str]]] = []

    def launch(config: LaunchConfig, arguments: list[str]) -> int:
        asked.append((config, arguments))
        return 3

    monkeypatch.setattr(reexec, "launch", launch)
    return asked


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_ranks_get_the_same_command_line(command, started):
    arguments = [*command, "--num-processes", "64", "--master-port", "29501"]
    assert app.run(arguments) == 3, "the ranks' exit code is the command's"
    ((config, passed),) = started
    assert (config.num_processes, config.master_port, passed) == (64, 29501, arguments)


def test_eval_reads_launch_from_set_but_not_from_the_run(started):
    (Path("r") / "model").mkdir(parents=True)
    (Path("r") / "model" / "config.json").write_text("{}")
    config = load_config(overrides=["launch.num_processes=2", "launch.max_restarts=5"])
    (Path("r") / "config.yaml").write_text(dump_run_record(config))
    assert app.run(["eval", "r", "--set", "launch.hostfile=hosts", "--set", "launch.env={A: b}"]) == 3
    assert started[0][0] == LaunchConfig(hostfile="hosts", env={"A": "b"})


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--num-processes", "0"], "--num-processes: launch.num_processes must be at least 1, not 0"),
        (["--launcher", "ssh"], "--launcher: launch.launcher must be 'pdsh', 'openmpi' or 'slurm', not 'ssh'"),
    ],
)
def test_mistakes_are_one_line(command, flags, expected, started, capsys):
    assert app.run([*command, *flags]) == 2
    streams = capsys.readouterr()
    assert expected in streams.err and streams.err.count("\n") == 1 and started == []


def test_words_that_the_shell_completes():
    offered = {key: completion(key) for key in ("disagreement.mode", "launch.launcher", "train.steps")}
    assert offered["disagreement.mode"]("p") == ["per_token"]
    assert offered["launch.launcher"]("") == ["pdsh", "openmpi", "slurm"]
    assert offered["train.steps"] is None, "the shell offers what it offers anyway"
    assert completion("engine.ds_config") is ds_configs
    Path("zero_mine.json").write_text("{}")
    assert ds_configs("zero3") == ["zero3", "zero3_hpz", "zero3_offload"]
    assert ds_configs("zero_") == ["zero_mine.json"]
