"""`vdr` from the outside, and which tests may run beside each other."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import pytest

from vdr_cli.system.imports import importing

HOSTS = ("tests/cluster/", "tests/rollout/test_vllm_real.py", "tests/integration/test_train_runs.py::test_launchers_")
"""One after the other: the hosts' addresses, and the port that launchers take when nobody names one, are there once."""
PROCESSES = (
    *HOSTS,
    "tests/integration/options/",
    "tests/engine/test_gather_layer.py",
    "tests/gpu/test_gpu_engine.py",
    "tests/scripts/test_gpu_check.py",
    "tests/integration/",
    "tests/recipes/test_recipe_runs.py",
)
"""Tests that start processes and wait for them, longest first. They run before all others, which fill the gaps."""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.hookimpl(hookwrapper=True)
def pytest_collection() -> Iterator[None]:
    with importing():
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return next((place for place, start in enumerate(PROCESSES) if item.nodeid.startswith(start)), len(PROCESSES))

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For --dist loadgroup: what shares a fixture of processes, or a file of other tests, stays in one worker."""
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            if nodeid.startswith(HOSTS):
                return "hosts"
            alone = nodeid.startswith("tests/integration/test_train_")
            return nodeid if alone else nodeid.split("::")[0]

    config.option.loadscopereorder = False
    return Scheduling(config, log)


def environment(**more: str) -> dict[str, str]:
    """The environment of a process that is no rank and has one thread."""
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return env | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200", **more}


def ranks_environments(ranks: int, **more: str) -> list[dict[str, str]]:
    """The environment of each rank, as a launcher sets it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    sizes = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [environment(RANK=str(rank), LOCAL_RANK=str(rank), **sizes, **meeting, **more) for rank in range(ranks)]


@pytest.fixture(scope="session")
def vdr() -> Run:
    """vdr(*arguments, timeout=300, **environment): the command as a user runs it; never raises on a bad exit code."""

    def run(*arguments: str, timeout: float = 300, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "vdr_cli", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment(**more))

    return run


ONLY_WRITER = """
import sys
from pathlib import Path
from vdr_cli.system.writers import only_writer
from vdr_cli.errors import ConfigError
try:
    with only_writer(Path(sys.argv[1])):
        print("writing", flush=True)
        sys.stdin.read()
except ConfigError:
    print("refused", flush=True)
"""


@pytest.fixture
def writer_elsewhere() -> Callable[..., AbstractContextManager[None]]:
    """writer_elsewhere(run, refused=False): another process holds the run directory, or is refused it, meanwhile."""

    @contextmanager
    def writing(run: Path, refused: bool = False) -> Iterator[None]:
        command = [sys.executable, "-c", ONLY_WRITER, str(run)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                assert process.stdout.readline().strip() == ("refused" if refused else "writing")
                yield
            finally:
                process.kill()

    return writing


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """forked(*arguments, ranks=1, **environment): the same without the seconds of imports.

    ranks: so many processes, as torchrun starts them; 1: one that no launcher started. Where the first argument is a
    file of Python, that program runs in the place of `vdr`.
    """
    said = [tmp_path_factory.mktemp("forks") / name for name in ("stdout", "stderr")]
    server: subprocess.Popen[str] | None = None
    alone = Lock()

    def alive() -> subprocess.Popen[str]:
        """Tests of the launcher end every process below theirs, this one too."""
        nonlocal server
        if server is None or server.poll() is not None:
            command = [sys.executable, str(Path(__file__).with_name("forks.py"))]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            server = subprocess.Popen(command, env=environment(), start_new_session=True, **pipes)
        return server

    def run(*arguments: str, ranks: int = 1, **more: str) -> subprocess.CompletedProcess[str]:
        environments = [environment(**more)] if ranks == 1 else ranks_environments(ranks, **more)
        run = {"arguments": arguments, "environments": environments, "said": [str(path) for path in said]}
        with alone:
            for path in said:
                path.write_text("")
            forks = alive()
            assert forks.stdin is not None and forks.stdout is not None
            print(json.dumps(run), file=forks.stdin, flush=True)
            code = int(forks.stdout.readline())
            return subprocess.CompletedProcess(["vdr", *arguments], code, *(path.read_text() for path in said))

    yield run
    if server is not None and server.poll() is None:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
