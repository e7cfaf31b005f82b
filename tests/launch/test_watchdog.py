"""Real ranks (processes without torch) with a watchdog each."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vdr_cli.launch import outcome
from vdr_cli.launch.environment import free_port

PROGRAMS = Path(__file__).parent / "programs"
RANK = (PROGRAMS / "watched_rank.py").read_text(encoding="utf-8")


def start(what: str, size: int = 3, directory: Path | None = None) -> list[subprocess.Popen[str]]:
    port = free_port()
    environment = dict(os.environ)
    if directory is not None:
        environment["VDR_RUN_DIRECTORY"] = str(directory)
    ranks = []
    for rank in range(size):
        command = [sys.executable, "-c", RANK, str(rank), str(size), str(port), what]
        environment["RANK"] = str(rank)
        ranks.append(subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=environment))
    for rank in ranks:
        assert rank.stdout is not None
        assert rank.stdout.readline() == "ready\n"
    return ranks


def ends(ranks: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    return [(rank.wait(60), rank.stderr.read() if rank.stderr else "") for rank in ranks]


def test_a_killed_rank_ends_the_others_and_is_named(tmp_path: Path) -> None:
    ranks = start("wait", directory=tmp_path)
    ranks[2].kill()
    (code_0, said_0), (code_1, said_1), _ = ends(ranks)  # on their own they would end with 0
    assert (code_0, code_1) == (4, 4)
    assert "rank 2: ended without a word" in said_0
    assert "rank 2: ended without a word" in said_1
    assert "rank 1, during reward" in said_1
    assert '"rank": 2' in (tmp_path / "fault.json").read_text()


def test_rank_0_killed_ends_the_others() -> None:
    ranks = start("wait")
    ranks[0].kill()
    assert [code for code, _ in ends(ranks)[1:]] == [4, 4]


def test_a_bug_on_one_rank_reaches_all() -> None:
    (code_0, said_0), (code_1, said_1), (code_2, said_2) = ends(start("bug"))
    assert (code_0, code_1, code_2) == (4, 1, 4)
    assert "rank 1: KeyError: 'answer'" in said_0
    assert "rank 1: KeyError: 'answer'" in said_2
    assert "Traceback" in said_1


def test_an_error_on_one_rank_alone_ends_the_others_after_the_timeout() -> None:
    (code_0, said_0), (code_1, _), (code_2, said_2) = ends(start("error"))
    assert (code_0, code_1, code_2) == (4, 1, 4)
    assert "rank 1: row 7" in said_0
    assert "rank 1: row 7" in said_2


def test_a_rank_that_is_done_disturbs_nobody() -> None:
    assert [code for code, _ in ends(start("end"))] == [0, 0, 0]


def test_a_fork_does_not_stand_for_its_dead_parent() -> None:
    """It has the parent's connections, which the kernel closes when the last process that has them lets go."""
    ranks = start("fork")
    time.sleep(1)
    ranks[1].kill()
    for rank in (ranks[0], ranks[2]):
        assert rank.wait(60) == 4


def test_signals_of_forked_workers_are_not_the_ranks() -> None:
    """multiprocessing ends its pools with SIGTERM: they end, and the rank does not take it for its own."""
    (rank,) = start("pool", size=1)
    ((code, said),) = ends([rank])
    assert code == 0, said
    assert rank.stdout is not None and rank.stdout.read() == "[1, 2]\n"


def test_a_fork_that_is_signalled_at_once_ends_and_the_rank_does_not_notice() -> None:
    (rank,) = start("early", size=1)
    ((code, said),) = ends([rank])
    assert code == 0, said
    assert rank.stdout is not None and rank.stdout.read() == f"{-signal.SIGTERM}\n"


def test_a_signal_that_leads_to_nothing_ends_in_time() -> None:
    (rank,) = start("wait", size=1)
    rank.send_signal(signal.SIGTERM)
    ((code, said),) = ends([rank])
    assert code == 128 + signal.SIGTERM
    assert "not done 2 s after SIGTERM" in said
    assert "launch.fault_timeout" in said


def test_ranks_whose_time_is_over_do_not_count_as_lost(tmp_path: Path) -> None:
    """A signal reaches them a little apart; who ends first is no fault of the others."""
    ranks = start("wait", directory=tmp_path)
    for rank in ranks:
        rank.send_signal(signal.SIGTERM)
        time.sleep(0.4)
    for code, said in ends(ranks):
        assert code == 128 + signal.SIGTERM and "not done 2 s after SIGTERM" in said
        assert "ended without a word" not in said
    assert not (tmp_path / "fault.json").exists()


def test_a_step_gets_the_time_that_steps_take(tmp_path: Path) -> None:
    """The longest took 1000 s, and the timeout is 2 s. The supervisor, which gives up later, reads it in the file."""
    (rank,) = start("long", size=1, directory=tmp_path)
    rank.send_signal(signal.SIGTERM)
    ((code, said),) = ends([rank])
    assert code == 0, said
    assert outcome.patience_told(tmp_path) == 2002.0
    outcome.forget_stop(tmp_path)
    assert outcome.patience_told(tmp_path) is None


@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_a_stop_file_is_a_signal(number: signal.Signals, tmp_path: Path) -> None:
    (rank,) = start("wait", size=1, directory=tmp_path)
    (tmp_path / "stop").write_text(str(int(number)))
    ((code, _),) = ends([rank])
    assert code == 128 + number


FORKING = (PROGRAMS / "forking.py").read_text(encoding="utf-8")


def test_a_fork_after_a_second_watchdog_leaves_no_signal_blocked() -> None:
    """In the child, which says so first, nor in the parent."""
    ended = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True, check=True)
    assert ended.stdout == "set()\nset()\n"
