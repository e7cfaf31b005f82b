import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from vdr_cli.config import Config
from vdr_cli.config.schema import LaunchConfig
from vdr_cli.errors import MachineError
from vdr_cli.launch import preflight
from vdr_cli.launch.environment import free_port
from vdr_cli.launch.preflight import Answer, Question, ask, check_hosts, compare, examine, question_for

ASKED = Question(
    ("/data/rows.jsonl",), ("/runs",), {"address": "10.0.0.1", "port": 29500, "others": 1, "patience": 0.2}
)
FACTS: dict[str, Any] = {
    "python": "3.11.7",
    "packages": {"torch": "2.13.0", "peft": None},
    "code": "abc",
    "files": {"/data/rows.jsonl": "10 bytes, 123"},
    "shared": {"/runs/.token": True},
    "accelerators": ["H200, 143771 MiB"] * 2,
}


def found(slots: int = 2, clock: float = 0.0, **changed: Any) -> list[str]:
    """The lines about a host that differs from this machine in the facts given."""
    return [problem.line() for problem in compare("h2", Answer({**FACTS, **changed}, clock=clock), FACTS, slots, ASKED)]


def test_a_host_like_this_one_is_ready() -> None:
    assert found() == []


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"python": "3.12.1"}, "host h2: Python 3.12.1, here 3.11.7; use the same environment"),
        ({"packages": {"torch": "2.6.0", "peft": None}}, "host h2: torch 2.6.0, here 2.13.0; install torch==2.13.0"),
        ({"packages": {"torch": "2.13.0", "peft": "1"}}, "host h2: peft 1, here none"),
        ({"code": None}, "host h2: vdr_cli cannot be imported"),
        ({"code": "xyz"}, "host h2: another version of vdr_cli"),
        ({"files": {"/data/rows.jsonl": None}}, "host h2: /data/rows.jsonl is not there"),
        ({"files": {"/data/rows.jsonl": "11 bytes, 9"}}, "host h2: /data/rows.jsonl differs (11 bytes, 9, here 10"),
        ({"shared": {"/runs/.token": False}}, "host h2: /runs is not the same directory as on this machine; mount it"),
        ({"port": "Address already in use"}, "host h2: port 29500 cannot be used: Address already in use"),
        ({"reached": "timed out"}, "host h2: cannot reach 10.0.0.1:29500, where rank 0 will listen: timed out"),
        ({"accelerators": []}, "host h2: no GPU, unlike this machine"),
        ({"slots": 3}, "host h2: 3 slots but 2 GPUs"),
        ({"clock": 30.0}, "host h2: its clock differs by +30 s"),
    ],
)  # fmt: skip
def test_every_difference_names_the_host_and_the_cure(changed: dict[str, Any], line: str) -> None:
    (said,) = found(**changed)
    assert said.startswith(line)
    assert "; " in said


@pytest.mark.parametrize(
    ("silence", "cure"),
    [
        ("Permission denied (publickey).", "ssh-copy-id h2"),
        ("ssh: Could not resolve hostname h2", "correct the name"),
        ("did not answer within 30 s", "ssh h2 true"),
        ("bash: /env/bin/python: No such file or directory", "must exist there"),
    ],
)
def test_silence_has_a_cure(silence: str, cure: str) -> None:
    (problem,) = compare("h2", Answer(silence=silence), FACTS, 1, ASKED)
    assert silence in problem.what
    assert cure in problem.cure


def test_every_file_that_differs_is_named() -> None:
    files = {"/a": "1 byte", "/b": "2 bytes"}
    theirs = Answer({**FACTS, "files": dict.fromkeys(files, "3 bytes"), "shared": {}})
    problems = compare("h2", theirs, {**FACTS, "files": files}, 2, Question(tuple(files)))
    assert [problem.what for problem in problems] == [
        "/a differs (3 bytes, here 1 byte)",
        "/b differs (3 bytes, here 2 bytes)",
    ]


def test_a_picked_slot_needs_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "ask", lambda *_: Answer({**FACTS, "files": {}, "shared": {}}))
    monkeypatch.setattr(preflight.probe, "host_facts", lambda _: FACTS)
    assert examine(LaunchConfig(), {"h2": [0, 1]}, Question())[1] == []
    (problem,) = examine(LaunchConfig(), {"h2": [2]}, Question())[1]
    assert problem.what == "3 slots but 2 GPUs"


def test_this_machine_answers_the_probe(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("{}\n")
    asked = Question((str(data),), (str(tmp_path / "runs"),))
    answers, problems = examine(LaunchConfig(), {"localhost": [0]}, asked)
    assert problems == []
    assert answers["localhost"].facts["files"][str(data)].startswith("3 bytes")
    assert not list(tmp_path.glob(".vdr-shared-*"))


def test_a_taken_port_is_noticed() -> None:
    import socket

    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        meeting = {"address": None, "port": port, "others": 0, "patience": 0.1}
        _, problems = examine(LaunchConfig(), {"localhost": [0]}, Question(meeting=meeting))
    assert [problem.host for problem in problems] == ["localhost"]
    assert f"port {port} cannot be used" in problems[0].what


def test_hosts_meet_on_the_port() -> None:
    meeting = {"address": "127.0.0.1", "port": free_port(), "others": 1, "patience": 15.0}
    _, problems = examine(LaunchConfig(), {"localhost": [0], "127.0.0.1": [0]}, Question(meeting=meeting))
    assert problems == []


def test_hosts_are_asked_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is answered before all have been asked."""
    together = threading.Barrier(20, timeout=60)

    def silent(*_: object) -> Answer:
        together.wait()
        return Answer(silence="did not answer within 20 s")

    monkeypatch.setattr(preflight, "ask", silent)
    hosts = {f"h{number}": [0] for number in range(20)}
    with pytest.raises(MachineError, match=r"host h0: no answer over ssh: did not answer within.*and 12 more"):
        check_hosts(LaunchConfig(), hosts, Question())


def test_a_host_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_remote_python", lambda *_: ["sleep", "3600"])
    monkeypatch.setattr(preflight, "TIMEOUT", 0.5)
    assert ask(LaunchConfig(), "h0", {}).silence == "did not answer within 0.5 s"


def test_a_run_asks_for_what_it_names(tmp_path: Path) -> None:
    config = Config.model_validate(
        {
            "model": {"name": "Qwen/Qwen2.5-0.5B"},
            "data": {"name": "./rows.jsonl"},
            "rewards": {"functions": [{"name": "./own.py:right"}]},
            "train": {"output": str(tmp_path)},
            "launch": {"master_addr": "10.0.0.1"},
        }
    )
    asked = question_for(config, {"h1": [0], "h2": [0]}, ["train", "run.yaml", "--steps", "3"])
    assert [Path(path).name for path in asked.files] == ["run.yaml", "rows.jsonl", "own.py"]
    assert asked.shared == (str(tmp_path),)
    assert asked.meeting is not None
    assert asked.meeting["port"] == 29500


def test_a_run_asks_for_every_file_of_the_users(tmp_path: Path) -> None:
    turns = {"environment": "./world.py:World", "tools": ["./world.py:add"], "tool_parser": "./calls.py:read"}
    config = Config.model_validate(
        {
            "rewards": {"functions": [{"name": "exact_match"}, {"name": "model:./judge"}]},
            "bonus": {"source": "./bonus.py:rare", "answer": "./answer.py:last"},
            "rollout": turns,
        }
    )
    asked = question_for(config, {"h1": [0]}, ["train", "--resume", str(tmp_path / "step_000002")])
    assert [Path(path).name for path in asked.files] == [
        "judge", "bonus.py", "answer.py", "world.py", "calls.py", "step_000002"
    ]  # fmt: skip


def test_noise_of_a_login_shell_is_not_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    script = f"echo Welcome!; echo 'vdr-probe:{json.dumps({'time': time.time()})}'"
    monkeypatch.setattr(preflight, "_remote_python", lambda *_: ["sh", "-c", script])
    assert set(ask(LaunchConfig(), "h1", {}).facts) == {"time"}
