"""The command line as a user meets it: help, errors on one line, exit codes, what the launcher adds."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vdr_cli import __version__
from vdr_cli.cli import app, train
from vdr_cli.errors import ConfigError, DataError, MachineError

HEAVY = ("torch", "transformers", "datasets", "numpy", "deepspeed", "pyarrow", "pydantic")


@pytest.fixture(autouse=True)
def _no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "VDR_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom vdr_cli.cli.app import run\nassert run(['--help']) == 0\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "train" in done.stdout and "score" in done.stdout


def test_a_run_is_checked_before_torch_is_imported():
    """The process that starts the ranks needs none, and each rank's torch reads what launch.env and the ranks beside
    it say about threads while it is imported."""
    code = (
        "import sys\nfrom vdr_cli.cli.app import run\nassert run(['train', '--num-processes', '2', '--dry-run']) == 0\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "False"


def test_a_rank_completes_its_environment_before_torch_is_imported():
    code = (
        "import os, sys\nos.environ.update(RANK='0', LOCAL_RANK='0', WORLD_SIZE='2')\n"
        "os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT='29500')\n"
        "from vdr_cli.cli import app, training\n"
        "training.prepare_process = lambda launch: sys.exit(7 if 'torch' in sys.modules else 8)\napp.run(['train'])"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 8


def test_a_rank_left_in_the_environment_silences_no_error(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    assert app.run(["train", "--set", "train.stpes=1"]) == 2
    assert "train.stpes" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert app.run(["train"]) == 2
    assert "the environment has RANK and WORLD_SIZE but no LOCAL_RANK; unset" in capsys.readouterr().err


def test_a_working_directory_that_was_deleted(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert app.run(["train", "--dry-run"]) == 4
    assert capsys.readouterr().err == "vdr: error: the working directory is not there any more; cd to one that is\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--dry-run", "--output"], ["train", "--dry-run", "--resume"], ["train", "--data"], ["report"],
        ["train", "--ds-config"], ["eval"], ["score", "--model", "starter"], ["score", "a.jsonl", "--model"], ["audit"],
    ],
)  # fmt: skip
def test_a_path_longer_than_any_file_system_takes(arguments, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    given = [*arguments, "/".join(["a" * 200] * 25)] + (["--output", "o"] if "--resume" in arguments else [])
    assert app.run(given) in (2, 4)
    said = capsys.readouterr().err
    assert "File name too long; give a shorter path" in said and len(said) < 400


@pytest.mark.parametrize("name", list(app.COMMANDS))
def test_every_help_has_examples(name, capsys):
    assert app.run([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Examples" in shown and f"vdr {name} " in shown


def test_version_and_no_arguments(capsys):
    assert app.run(["--version"]) == 0
    assert capsys.readouterr().out == f"vdr {__version__}\n"
    assert app.run([]) == 0
    assert "Usage: vdr" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        (["--local_rank=1", "train", "a"], ["train", "a"]),
        (["train", "--local-rank=0", "a"], ["train", "a"]),
        (["--local_rank", "1", "train"], ["train"]),
        (["--local_rank", "train"], ["train"]),
        (["train", "--seed", "1"], ["train", "--seed", "1"]),
        (["train", "--local_ranks=1"], ["train", "--local_ranks=1"]),
    ],
)
def test_launchers_local_rank_is_dropped(arguments, kept):
    assert app.without_local_rank(arguments) == kept


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "No such command 'trian'"),
        (["train", "--stepz", "3"], "No such option"),
        (["train", "--num_generations", "8"], "No such option: --num_generations; did you mean --group-size?"),
        (["train", "--lr_scheduler_type=linear"], "did you mean --set train.lr_schedule=...?"),
        (["train", "--steps", "many"], "Invalid value for '--steps'"),
        (["train", "a.yaml", "b.yaml"], "unexpected extra argument"),
        (["eval"], "Missing argument"),
        (["score", "a.jsonl"], "Missing option '--model'"),
    ],
)
def test_usage_errors_are_one_line(arguments, expected, capsys):
    assert app.run(arguments) == 2
    streams = capsys.readouterr()
    assert streams.out == "" and streams.err.count("\n") == 1
    assert streams.err.startswith("vdr: error: ") and expected in streams.err


@pytest.mark.parametrize(("error", "code"), [(ConfigError, 2), (DataError, 3), (MachineError, 4)])
def test_our_errors_are_one_untouched_line(error, code, monkeypatch, capsys):
    message = "row 3: [bold]completion[/bold] \x1b[31m" + "x" * 300 + "\nnext"
    monkeypatch.setattr(train, "config_from", raising(error(message)))
    assert app.run(["train"]) == code
    shown = capsys.readouterr().err
    assert shown == "vdr: error: row 3: [bold]completion[/bold] ␛[31m" + "x" * 300 + " next\n"


SECOND = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def said_by(rank: dict[str, str], monkeypatch, capsys) -> str:
    """The lines that this rank prints about an error."""
    monkeypatch.setattr(train, "config_from", raising(ConfigError("no")))
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in rank.items():
        monkeypatch.setenv(name, value)
    assert app.run(["train"]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("launcher", [{"LOCAL_SIZE": "2"}, {"LOCAL_WORLD_SIZE": "2"}])  # deepspeed, torchrun
def test_a_rank_beside_the_first_one_waits_for_its_launcher_to_end_it(launcher, monkeypatch, capsys):
    """It speaks when it is the only one that has met the error."""
    waited: list[float] = []
    monkeypatch.setattr(app.time, "sleep", waited.append)
    line = f"vdr: error: host {socket.gethostname()}, rank 1: no\n"
    assert said_by({**SECOND, **launcher}, monkeypatch, capsys) == line
    assert waited == [app.HEAD_START]
    assert said_by({**SECOND, **launcher, "RANK": "0", "LOCAL_RANK": "0"}, monkeypatch, capsys) == "vdr: error: no\n"
    assert len(waited) == 1


@pytest.mark.parametrize("place", [{}, {"LOCAL_RANK": "0", "LOCAL_SIZE": "1"}])
def test_a_rank_that_rank_zero_does_not_know_of_speaks(place, monkeypatch, capsys):
    """It is alone on its host, or was started by hand: its file or its GPU may be missing there alone."""
    monkeypatch.setattr(app.time, "sleep", raising(AssertionError("nobody else would speak")))
    line = f"vdr: error: host {socket.gethostname()}, rank 1: no\n"
    assert said_by({**SECOND, **place}, monkeypatch, capsys) == line


def test_ranks_that_have_met_leave_it_to_rank_zero(monkeypatch, capsys):
    class Torch:
        class distributed:  # noqa: N801
            is_initialized = staticmethod(lambda: True)

    monkeypatch.setitem(sys.modules, "torch", Torch)
    assert said_by({**SECOND, "LOCAL_RANK": "0"}, monkeypatch, capsys) == ""


def test_an_error_that_cannot_be_printed_has_its_exit_code():
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    program = [sys.executable, "-m", "vdr_cli", "train", "--output", ""]
    with Path("/dev/full").open("w") as full:
        assert subprocess.run(program, stderr=full, env=environment).returncode == 2


def test_traceback_on_request(monkeypatch, capsys):
    monkeypatch.setattr(train, "config_from", raising(ConfigError("no")))
    monkeypatch.setenv("VDR_TRACEBACK", "1")
    assert app.run(["train"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown and shown.endswith("vdr: error: no\n")


def test_interrupt_and_bugs(monkeypatch):
    monkeypatch.setattr(train, "config_from", raising(KeyboardInterrupt()))
    assert app.run(["train"]) == 130
    monkeypatch.setattr(train, "config_from", raising(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError):
        app.run(["train"])


def test_a_full_disk_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(train, "config_from", raising(OSError(28, "No space left on device", "runs/a/x")))
    assert app.run(["train"]) == 4
    assert (
        capsys.readouterr().err == "vdr: error: runs/a/x: No space left on device; free some space and run it again\n"
    )
    monkeypatch.setattr(train, "config_from", raising(OSError(30, "Read-only file system", "runs/a/x")))
    assert app.run(["train"]) == 4
    assert "runs/a/x: Read-only file system; get the permission, or choose another place" in capsys.readouterr().err
    monkeypatch.setattr(train, "config_from", raising(OSError(5, "Input/output error")))
    with pytest.raises(OSError):
        app.run(["train"])


def test_a_terminal_that_is_not_utf8():
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-m", "vdr_cli", "train", "--dry-run", "--output", "runs/\u03bb"],
        capture_output=True,
        text=True,
        env={**environment, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    assert "\\u03bb" in done.stdout


def test_the_module_is_the_command():
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-m", "vdr_cli", "--local_rank=0", "train", "none.yaml"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert (done.returncode, done.stderr) == (2, "vdr: error: none.yaml: no such configuration file\n")


def raising(error: BaseException):
    def fail(*_args, **_kwargs):
        raise error

    return fail


@pytest.mark.parametrize(
    ("words", "code", "said"), [(["--version"], 0, "vdr "), (["train", "--nosuch"], 2, "--nosuch")]
)
def test_a_rank_leaves_with_its_code_and_all_that_it_said(words: list[str], code: int, said: str) -> None:
    """It skips the interpreter's end, which would have flushed what goes into a pipe."""
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "PYTHONUNBUFFERED": ""}
    program = [sys.executable, "-m", "vdr_cli", *words]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert said in done.stdout + done.stderr
