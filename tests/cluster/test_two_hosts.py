"""Two hosts on this machine (scripts/verify/cluster_hosts.py): launches, equality with one host, a lost host."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
HOSTS = ROOT / "scripts" / "verify" / "cluster_hosts.py"
SMALL = [
    "train", "--steps", "4", "--set", "train.prompts_per_step=4", "--group-size", "4", "--members", "2",
    "--set", "train.checkpoint_every=1", "--set", "observe.tensorboard=false", "--set", "observe.report=false",
]  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}


def missing() -> str | None:
    """The reason that two hosts cannot be made here."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux (network namespaces)"
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    programs = [name for name in ("ip", "sshd", "ssh", "pdsh") if shutil.which(name, path=path) is None]
    if programs:
        return f"needs {', '.join(programs)}: bash scripts/install_test_tools.sh"
    probe = subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False)
    return "may not make network namespaces" if probe.returncode else None


pytestmark = [pytest.mark.cluster, pytest.mark.skipif(missing() is not None, reason=str(missing()))]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory with the hostfile; two hosts, one slot each."""
    directory = tmp_path_factory.mktemp("hosts")
    subprocess.run([sys.executable, HOSTS, "--dir", directory, "up", "--hosts", "2"], check=True)
    yield directory
    subprocess.run([sys.executable, HOSTS, "--dir", directory, "down"], check=True)


@pytest.fixture(scope="module")
def on_one_host(tmp_path_factory: pytest.TempPathFactory, forked) -> Path:
    output = tmp_path_factory.mktemp("runs") / "one_host"
    ended = forked(*SMALL, "--output", str(output), ranks=2)
    assert ended.returncode == 0, ended.stderr
    return output


def on_h1(hosts: Path, *command: str) -> list[str]:
    return [sys.executable, str(HOSTS), "--dir", str(hosts), "exec", "h1", *command]


def vdr_over(hosts: Path, output: Path, *more: str) -> list[str]:
    places = ["--hostfile", str(hosts / "hostfile"), "--master-addr", "10.77.0.1"]
    interface = ["--set", "launch.env.GLOO_SOCKET_IFNAME=eth0"]
    return on_h1(hosts, sys.executable, "-m", "vdr_cli", *SMALL, *places, *interface, "--output", str(output), *more)


def curve(run: Path) -> list[tuple[float, ...]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["loss"], row["reward"], row["grad_norm"], row["disagreement/mean"]) for row in rows]


def assert_same_curve(run: Path, other: Path) -> None:
    ours, theirs = curve(run), curve(other)
    assert len(ours) == len(theirs) == 4
    for row, expected in zip(ours, theirs, strict=True):
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_two_hosts_train_as_one(hosts: Path, on_one_host: Path, tmp_path: Path) -> None:
    run = tmp_path / "my run"  # the name passes through three shells
    subprocess.run(vdr_over(hosts, run), env=ENVIRONMENT, check=True, timeout=500)
    assert_same_curve(run, on_one_host)


def test_the_users_own_deepspeed_command(hosts: Path, on_one_host: Path, tmp_path: Path) -> None:
    (tmp_path / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth0\nDS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    launch = [deepspeed, "--hostfile", str(hosts / "hostfile"), "--master_addr", "10.77.0.1", "--module", "vdr_cli"]
    command = on_h1(hosts, *launch, *SMALL, "--output", str(tmp_path / "run"))
    subprocess.run(command, env=ENVIRONMENT, check=True, timeout=500, cwd=tmp_path)
    assert_same_curve(tmp_path / "run", on_one_host)


def test_a_host_that_is_not_there_is_named_before_anything_starts(hosts: Path, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("h1 slots=1\nh7 slots=1\n")
    command = vdr_over(hosts, tmp_path / "run", "--hostfile", str(tmp_path / "hosts"))
    ended = subprocess.run(command, env=ENVIRONMENT, check=False, timeout=120, capture_output=True, text=True)
    assert ended.returncode == 4
    assert "host h7: no answer over ssh" in ended.stderr
    assert not (tmp_path / "run").exists()


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for n in range(1500):  # two windows: one for each process
            a, b, c = n % 9 + 1, n % 7 + 1, n % 5 + 1
            row = {"prompt": f"{a},{b},{c}={n % 60}:", "completion": f"{a}+{b}*{c}"[: n % 5 + 1]}
            file.write(json.dumps(row) + "\n")
    return path


def test_a_killed_pdsh_is_no_success(hosts: Path, rows: Path, tmp_path: Path) -> None:
    """DeepSpeed's runner would return 0, and vdr score leaves no other word on how it ended."""
    score = [sys.executable, "-m", "vdr_cli", "score", str(rows), "--model", "starter", "-o", str(tmp_path / "o.jsonl")]
    command = on_h1(hosts, *score, "--hostfile", str(hosts / "hostfile"), "--master-addr", "10.77.0.1")
    process = subprocess.Popen(command, env={**ENVIRONMENT, "GLOO_SOCKET_IFNAME": "eth0"})
    pdsh: list[psutil.Process] = []
    deadline = time.monotonic() + 120
    while not pdsh and time.monotonic() < deadline:
        time.sleep(0.1)
        below = psutil.Process(process.pid).children(recursive=True)
        pdsh = [each for each in below if each.name() in ("pdsh", "pdsh.bin")]
    assert pdsh
    time.sleep(3)
    pdsh[0].kill()
    assert process.wait(120) == 4
    assert not (tmp_path / "o.jsonl").exists()


def test_score_over_two_hosts_is_score(hosts: Path, rows: Path, forked, tmp_path: Path) -> None:
    """`vdr eval` is started in the same way (tests/integration/test_eval_score_ranks.py has its ranks)."""
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    score = ["score", str(rows), "--model", "starter", "--members", "2", "-o"]
    places = ["--hostfile", str(hosts / "hostfile"), "--master-addr", "10.77.0.1"]
    assert forked(*score, str(one)).returncode == 0
    over = on_h1(hosts, sys.executable, "-m", "vdr_cli", *score, str(two), *places)
    subprocess.run(over, env={**ENVIRONMENT, "GLOO_SOCKET_IFNAME": "eth0"}, check=True, timeout=300)
    assert two.read_bytes() == one.read_bytes()


def ranks_of(run: Path) -> list[psutil.Process]:
    """The ranks of a run on all hosts: namespaces hide no process."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get("VDR_RUN_DIRECTORY") == str(run) and "RANK" in process.environ():
                found.append(process)
    return found


def test_ranks_that_start_after_their_connection_was_lost_end(hosts: Path, tmp_path: Path) -> None:
    """The command is killed while the ranks still import: they never saw the sshd above them."""
    run = tmp_path / "run"
    process = subprocess.Popen(vdr_over(hosts, run, "--steps", "2000"), env=ENVIRONMENT)
    deadline = time.monotonic() + 120
    while len(ranks_of(run)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    _, alive = psutil.wait_procs(ranks_of(run), timeout=60)
    for each in alive:
        each.kill()
    assert not alive


def test_a_lost_host_is_named_and_the_run_goes_on_without_it(hosts: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    faults = ["--set", "launch.fault_timeout=10", "--max-restarts", "1", "--set", "launch.drop_lost_hosts=true"]
    command = vdr_over(hosts, run, "--steps", "40", *faults)
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (run / "checkpoints" / "step_000002").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    subprocess.run([sys.executable, HOSTS, "--dir", hosts, "lose", "h2"], check=True)
    try:
        _, said = process.communicate(timeout=300)
    finally:
        subprocess.run([sys.executable, HOSTS, "--dir", hosts, "up", "--hosts", "2"], check=True)
    assert process.returncode == 0, said
    assert "host h2, rank 1" in said
    assert "ended with exit code 4; restart 1 of 1 from the newest checkpoint" in said
    assert "without h2, which no longer answers: 1 process left" in said
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 41))
