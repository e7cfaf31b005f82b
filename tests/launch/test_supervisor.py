"""The supervisor over small scripts that stand for the launcher and its ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from vdr_cli.launch import outcome, reexec, supervisor
from vdr_cli.launch.processes import ranks_below
from vdr_cli.launch.supervisor import Plan, Signals, resuming, run_once, supervise
from vdr_cli.system import processes

FINISH = "import pathlib, sys; pathlib.Path(sys.argv[1], 'finished.json').write_text('{}')"


def plan(script: str, directory: Path, over_ssh: bool = False, fault_timeout: float = 2.0) -> Plan:
    def command(arguments: Sequence[str]) -> list[str]:
        return [sys.executable, "-c", script, str(directory), *arguments]

    return Plan(command, os.environ, directory, over_ssh, fault_timeout, directory)


def test_a_request_to_stop_ends_with_the_run(tmp_path: Path) -> None:
    """A later start, of one process perhaps, is not to obey it."""
    script = f"import time; {FINISH}; pathlib.Path(sys.argv[1], 'stop').write_text('15')"
    assert run_once(plan(script, tmp_path, over_ssh=True), [], Signals()) == 0
    assert outcome.asked_to_stop(tmp_path) is None


@pytest.mark.parametrize(
    ("script", "code"),
    [
        (FINISH, 0),
        ("", 4),  # exit code 0 without the run's own word
        (FINISH + "; sys.exit(3)", 3),
        ("raise SystemExit(2)", 2),
        ("raise SystemExit(247)", 4),
        ("raise SystemExit(143)", 143),  # a rank had SIGTERM, saved and ended
        ("import os; os.kill(os.getpid(), 9)", 4),
    ],
)
def test_exit_codes(script: str, code: int, tmp_path: Path) -> None:
    assert run_once(plan(script, tmp_path), [], Signals()) == code


def test_what_a_rank_started_is_no_rank() -> None:
    """Programs of a reward function have RANK in their environment as well; a signal for the ranks is not for them."""
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(20)'])"
    rank = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "RANK": "0"})
    try:
        while not psutil.Process(rank.pid).children():
            time.sleep(0.02)
        assert [process.pid for process in ranks_below()] == [rank.pid]
    finally:
        processes.end_descendants(5.0)
        rank.wait()


def test_an_earlier_runs_word_does_not_count(tmp_path: Path) -> None:
    outcome.write_finished(tmp_path, step=3)
    assert run_once(plan("", tmp_path), [], Signals()) == 4
    assert outcome.finished(tmp_path), "the run that did nothing was refused, perhaps, and the earlier one stays"
    assert run_once(plan(FINISH, tmp_path), [], Signals()) == 0


@pytest.mark.parametrize(
    ("code", "restarts", "told"),
    [(3, 2, []), (4, 0, ["host h2, rank 1: what it was"])],  # rank 0 has printed the user's own mistakes
)
def test_the_runs_own_word_on_a_fault_decides(tmp_path: Path, code: int, restarts: int, told: list[str]) -> None:
    fault = {"host": "h2", "rank": 1, "message": "what it was", "exit_code": code}
    script = f"import pathlib, sys; pathlib.Path(sys.argv[1], 'fault.json').write_text({json.dumps(fault)!r})"
    said: list[str] = []
    assert supervise(plan(script + "; sys.exit(1)", tmp_path), [], restarts, said.append) == code
    assert said == told


CALLED = """import pathlib, sys
p = pathlib.Path(sys.argv[1])
(p / 'calls').open('a').write(' '.join(sys.argv[2:]) + '|')"""
SAVING = f"""{CALLED}
step = p / 'checkpoints' / 'step_000001'
step.mkdir(parents=True, exist_ok=True)
(step / 'manifest.json').write_text('')
sys.exit(9)"""


def checkpoint(directory: Path, step: int) -> Path:
    path = directory / "checkpoints" / f"step_{step:06d}"
    path.mkdir(parents=True)
    (path / "manifest.json").write_text("{}")
    return path


def test_restarts_resume_and_end(tmp_path: Path) -> None:
    said: list[str] = []
    assert supervise(plan(SAVING, tmp_path), ["train", "--resume", "x"], 2, said.append) == 9
    assert (tmp_path / "calls").read_text().split("|")[:3] == ["train --resume x", *["train --resume auto"] * 2]
    assert said == [f"ended with exit code 9; restart {number} of 2 from the newest checkpoint" for number in (1, 2)]


def test_a_run_that_was_asked_to_end_is_not_restarted(tmp_path: Path) -> None:
    said: list[str] = []
    assert supervise(plan("raise SystemExit(143)", tmp_path), [], 3, said.append) == 143
    assert not said


def test_a_restart_uses_the_plan_that_is_renewed(tmp_path: Path) -> None:
    def renew(_: Plan) -> Plan:
        return plan(FINISH, tmp_path)

    said: list[str] = []
    assert supervise(plan("raise SystemExit(4)", tmp_path), [], 1, said.append, renew) == 0
    assert said == ["ended with exit code 4; restart 1 of 1 from the newest checkpoint"]


def test_a_signal_before_there_are_ranks_ends_the_launch(tmp_path: Path) -> None:
    """Nobody is there to save anything, and nobody would hear it later."""
    signals = Signals([signal.SIGINT], [time.monotonic()])
    assert run_once(plan("import time; time.sleep(60)", tmp_path), [], signals) == 130


def test_a_signal_that_cannot_be_passed_on_ends_the_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over ssh a file in the run directory says it; on a full disk nothing could be saved anyway."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(outcome, "_write", full)
    signals = Signals([signal.SIGTERM], [time.monotonic()])
    assert run_once(plan("import time; time.sleep(60)", tmp_path, over_ssh=True), [], signals) == 143


STUCK = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"


def test_ranks_that_hear_nothing_are_ended_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is stuck in C code runs no handler and no watchdog."""
    monkeypatch.setattr(supervisor, "SLACK", 0.0)
    monkeypatch.setenv("RANK", "0")
    signals = Signals([signal.SIGTERM], [time.monotonic()])
    assert run_once(plan(STUCK, tmp_path, fault_timeout=0.5), [], signals) == 143


def test_ranks_in_a_long_step_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0's watchdog says how long its step may take when the signal arrives."""

    def ask(*_: object) -> bool:
        (tmp_path / "patience").write_text("1000.0")
        return True

    monkeypatch.setattr(supervisor, "SLACK", 0.0)
    monkeypatch.setattr(supervisor, "_ask_ranks_to_stop", ask)
    signals = Signals([signal.SIGTERM], [time.monotonic()])
    script = f"import time; time.sleep(3); {FINISH}"
    assert run_once(plan(script, tmp_path, fault_timeout=0.5), [], signals) == 0
    assert not (tmp_path / "patience").exists()


def test_what_a_reward_left_behind_does_not_undo_success(tmp_path: Path) -> None:
    """A helper process that ignores SIGTERM is killed; the run has finished all the same."""
    helper = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    started = f"subprocess.Popen([sys.executable, '-c', {helper!r}], stdout=subprocess.PIPE).stdout.readline()"
    script = f"{FINISH}; import subprocess; {started}"
    processes.adopt_orphans()
    assert run_once(plan(script, tmp_path, fault_timeout=0.5), [], Signals()) == 0
    assert not psutil.Process().children()


def test_resuming_replaces_what_was_given() -> None:
    given = ["train", "--resume", "a", "--steps", "3"]
    assert resuming(given, has_own=True) == ["train", "--steps", "3", "--resume", "auto"]
    assert resuming(["train", "--resume=a"], has_own=True) == ["train", "--resume", "auto"]


@pytest.mark.parametrize("resume", [["--resume", "a/step_000002"], ["--resume=a/step_000002"]])
def test_a_restart_without_a_checkpoint_of_its_own_goes_on_from_the_one_that_was_named(resume: list[str]) -> None:
    """From `auto` it would train the base model, and say that it had finished."""
    given = ["train", *resume, "--output", "b"]
    assert resuming(given, has_own=False) == given
    assert resuming(given, has_own=True) == ["train", "--output", "b", "--resume", "auto"]
    for started in (["train"], ["train", "--resume", "auto"]):
        assert resuming(started, has_own=False) == ["train", "--resume", "auto"]


def test_a_restart_keeps_to_the_earlier_checkpoint_until_it_has_written_one(tmp_path: Path) -> None:
    """The run holds a later one, which the user wants to drop; a conversion alters the directory of the named one."""
    named, later = checkpoint(tmp_path, 2), checkpoint(tmp_path, 4)
    script = f"{CALLED}; (p / 'checkpoints' / 'step_000002' / 'universal').touch(); sys.exit(9)"
    said: list[str] = []
    assert supervise(plan(script, tmp_path), ["train", "--resume", str(named)], 1, said.append) == 9
    assert (tmp_path / "calls").read_text() == f"train --resume {named}|" * 2
    assert said == [f"ended with exit code 9; restart 1 of 1 from {named}"]

    (tmp_path / "calls").unlink()
    script = f"{CALLED}; (p / 'checkpoints' / 'step_000004' / 'manifest.json').write_text('new'); sys.exit(9)"
    assert supervise(plan(script, tmp_path), ["train", "--resume", str(named)], 1, said.append) == 9
    assert (tmp_path / "calls").read_text().split("|")[1] == "train --resume auto", f"{later} is its own now"


def test_a_command_without_checkpoints_is_repeated(tmp_path: Path) -> None:
    """`vdr eval` has no --resume, and that of `vdr score` takes no value."""
    given = ["score", "--resume", "rows.jsonl"]
    repeated = Plan(plan(f"{CALLED}; sys.exit(9)", tmp_path).command, os.environ, None, False, 2.0)
    said: list[str] = []
    assert supervise(repeated, given, 1, said.append) == 9
    assert (tmp_path / "calls").read_text() == "score --resume rows.jsonl|" * 2
    assert said == ["ended with exit code 9; restart 1 of 1"]


def test_nothing_outlives_the_launcher(tmp_path: Path) -> None:
    """The launcher is killed; its rank ignores SIGTERM."""
    script = (
        "import os, subprocess, sys, pathlib, time\n"
        "rank = 'import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(600)'\n"
        "child = subprocess.Popen([sys.executable, '-c', rank], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "pathlib.Path(sys.argv[1], 'pid').write_text(str(child.pid))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    said: list[str] = []
    assert supervise(plan(script, tmp_path, fault_timeout=1.0), [], 0, said.append) == 4
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_a_failed_host_ends_the_others_within_the_bound(tmp_path: Path) -> None:
    line = "pdsh@h1: h2: ssh exited with exit code 7"
    script = f"import sys, time; print('{line}', file=sys.stderr, flush=True); time.sleep(600)"
    assert run_once(plan(script, tmp_path, over_ssh=True, fault_timeout=1.0), [], Signals()) == 4


class Unwritable:
    """A stream on a full disk, or a closed one."""

    def __init__(self, error: Exception) -> None:
        self.error, self.buffer = error, self

    def write(self, _: object) -> None:
        raise self.error

    flush = write


@pytest.mark.parametrize("stream", [Unwritable(OSError(28, "full")), Unwritable(ValueError("closed")), None])
def test_a_failed_host_is_noticed_when_stderr_cannot_be_written(
    stream: Unwritable | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader of pdsh's output must not end: pdsh would wait for it in a write."""
    monkeypatch.setattr(sys, "stderr", stream)
    line = "pdsh@h1: h2: ssh exited with exit code 7"
    script = f"import sys, time; print('a\\n{line}', file=sys.stderr, flush=True); time.sleep(6); {FINISH}"
    assert run_once(plan(script, tmp_path, over_ssh=True, fault_timeout=1.0), [], Signals()) == 4


def test_a_line_that_cannot_be_said_cancels_no_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Unwritable(OSError(28, "full")))
    renewed = plan(FINISH, tmp_path)
    assert supervise(plan("raise SystemExit(4)", tmp_path), [], 1, reexec._say, lambda _: renewed) == 0


PROGRAMS = Path(__file__).parent / "programs"
SUPERVISED = (PROGRAMS / "supervised.py").read_text(encoding="utf-8")


def supervised(directory: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", SUPERVISED, str(directory)])
    deadline = time.monotonic() + 30
    while not (directory / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_ranks_save(number: signal.Signals, tmp_path: Path) -> None:
    process = supervised(tmp_path)
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    assert (tmp_path / "saved").read_text() == str(int(number))


def test_killing_the_supervisor_ends_what_it_started(tmp_path: Path) -> None:
    process = supervised(tmp_path)
    (below,) = psutil.Process(process.pid).children()
    process.kill()
    assert psutil.wait_procs([below], timeout=60)[1] == []


TETHERED = (PROGRAMS / "tethered.py").read_text(encoding="utf-8")
RUNNER = (PROGRAMS / "runner.py").read_text(encoding="utf-8")


def test_deepspeeds_runner_never_gets_to_its_signal_handler(tmp_path: Path) -> None:
    """Its handler kills every launcher on every host; the tether kills it and ends what it had started."""
    above = subprocess.Popen([sys.executable, "-c", TETHERED, RUNNER, str(tmp_path)])
    deadline = time.monotonic() + 30
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    below = psutil.Process(int((tmp_path / "pid").read_text()))
    above.kill()
    assert psutil.wait_procs([below], timeout=60)[1] == []
    assert not (tmp_path / "handler ran").exists()
