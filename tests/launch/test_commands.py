import base64
import itertools
import json
from pathlib import Path

import pytest

from vdr_cli.config.schema import LaunchConfig
from vdr_cli.errors import ConfigError, MachineError
from vdr_cli.launch import preflight
from vdr_cli.launch.arguments import decode, encode, named_checkpoint
from vdr_cli.launch.commands import Target, check_plain, node_command, runner_command, srun_command
from vdr_cli.launch.preflight import Answer
from vdr_cli.launch.reexec import hosts_of, launch, make_plan, remaining

ARGUMENTS = ("train", "--set", "rewards.functions=[{name: 'a;b $(x)'}]")


def test_node_command() -> None:
    hosts = {"h1": [0, 1], "h2": [0]}
    command = node_command(Target(ARGUMENTS, "/py"), hosts, 1, "10.0.0.1", 29501)
    world = next(word for word in command if word.startswith("--world_info=")).removeprefix("--world_info=")
    assert json.loads(base64.urlsafe_b64decode(world)) == hosts
    assert command[:4] == ["/py", "-u", "-m", "vdr_cli.launch.node"]
    assert {"--node_rank=1", "--master_addr=10.0.0.1", "--master_port=29501", "--no_local_rank"} <= set(command)
    assert command[-len(ARGUMENTS) - 2 :] == ["--module", "vdr_cli", *ARGUMENTS]


def test_runner_command_has_nothing_that_a_shell_reads() -> None:
    launch = LaunchConfig(hostfile="h", master_addr="10.0.0.1", ssh_port=2222)
    command = runner_command(Target(ARGUMENTS, "/py"), {"h1": [0], "h2": [1]}, Path("/tmp/x/hostfile"), launch)
    assert decode(command[-1:]) == list(ARGUMENTS)
    assert not set("".join(command)) & set(" ;$`'\"[](){}&|<>\\")
    options = dict(itertools.pairwise(command))
    assert options["--include"] == "h1:0@h2:1"
    assert (options["--master_addr"], options["--ssh_port"]) == ("10.0.0.1", "2222")


def test_slurm_runs_every_rank_as_a_task() -> None:
    command = srun_command(Target(("train",), "/py"), {"h1": [0, 1], "h2": [0, 1]})
    assert {"--ntasks=4", "--ntasks-per-node=2", "--nodelist=h1,h2", "--kill-on-bad-exit=1"} <= set(command)
    with pytest.raises(ConfigError, match="same number of slots"):
        srun_command(Target(()), {"h1": [0], "h2": [0, 1]})


def test_picked_slots_need_pdsh() -> None:
    with pytest.raises(ConfigError, match="cannot be picked"):
        srun_command(Target(()), {"h1": [1]})


@pytest.mark.parametrize("arguments", [[], ["train"], ["--set", "a='é \n$x'"]])
def test_arguments_travel_unread(arguments: list[str]) -> None:
    code = encode(arguments)
    assert decode([code]) == arguments
    assert decode(arguments) == arguments
    assert code.replace("-", "").replace("_", "").replace("=", "").isalnum()


@pytest.mark.parametrize(
    ("arguments", "checkpoint"),
    [
        (["train", "--resume", "a/step_000002", "--steps", "3"], "a/step_000002"),
        (["train", "--resume=a/step_000002"], "a/step_000002"),
        (["train", "--resume", "auto"], None),
        (["train", "--resume=auto"], None),
        (["train"], None),
    ],
)
def test_the_checkpoint_that_is_named(arguments: list[str], checkpoint: str | None) -> None:
    assert named_checkpoint(arguments) == checkpoint


@pytest.mark.parametrize("address", ["$(reboot)", "a b", "-x", "a;b"])
def test_master_addr_is_a_name(address: str) -> None:
    with pytest.raises(ConfigError, match=r"launch\.master_addr"):
        check_plain(LaunchConfig(master_addr=address), "/tmp")


def test_a_working_directory_that_a_shell_reads_is_refused() -> None:
    with pytest.raises(ConfigError, match="working directory"):
        check_plain(LaunchConfig(), "/tmp/$(x)")


@pytest.mark.parametrize("name", ["$(x)", "a;b", "läufe", "a'b"])
def test_a_run_directory_that_a_shell_reads_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.output"):
        check_plain(LaunchConfig(), "/tmp", Path("/tmp", name))
    check_plain(LaunchConfig(), "/tmp", Path("/tmp/my run-1"))


def test_plan_over_hosts_writes_the_files_that_deepspeed_reads(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("h1 slots=2\nh2 slots=2\n")
    launch = LaunchConfig(hostfile=str(hostfile), env={"GLOO_SOCKET_IFNAME": "eth0"}, num_processes=1)
    hosts = hosts_of(launch)
    plan = make_plan(launch, hosts, tmp_path, tmp_path)
    assert plan.over_ssh
    travelling = Path(plan.environment["DS_ENV_FILE"]).read_text().splitlines()
    # Of the second, ranks learn that an sshd is to be above them: they may look when the connection is lost already.
    assert {"GLOO_SOCKET_IFNAME=eth0", "VDR_OVER_SSH=1"} <= set(travelling)
    assert (tmp_path / "hostfile").read_text() == "h1 slots=1\nh2 slots=1\n"
    assert "h1:0@h2:0" in plan.command(["train"])


@pytest.mark.parametrize(("given", "address"), [(None, "h1"), ("10.0.0.1", "10.0.0.1")])
def test_mpirun_tells_the_ranks_where_the_first_host_is(given: str | None, address: str, tmp_path: Path) -> None:
    """DeepSpeed's openmpi launcher does not; over pdsh and srun the launcher does."""
    launch = LaunchConfig(launcher="openmpi", master_addr=given)
    plan = make_plan(launch, {"h1": [0], "h2": [0]}, tmp_path, tmp_path)
    travelling = Path(plan.environment["DS_ENV_FILE"]).read_text().splitlines()
    assert {f"MASTER_ADDR={address}", "MASTER_PORT=29500"} <= set(travelling)


def test_plan_without_ssh_starts_this_host_only(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("h1 slots=2\nh2 slots=2\n")
    given = {"hostfile": str(hostfile), "no_ssh": True, "master_addr": "h1", "node_rank": 1}
    plan = make_plan(LaunchConfig(**given), hosts_of(LaunchConfig(**given)), tmp_path, tmp_path)
    assert "--node_rank=1" in plan.command(["train"])
    assert plan.directory is None
    assert plan.resumes == tmp_path, "after a fault its ranks resume from the same checkpoint as the first host's"
    for lacking, message in (("node_rank", "node.rank"), ("master_addr", "master.addr")):
        partial = LaunchConfig(**{**given, lacking: None})
        with pytest.raises(ConfigError, match=message):
            make_plan(partial, hosts_of(partial), tmp_path, tmp_path)


def test_a_restart_leaves_out_hosts_that_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = {"h1": [0], "h2": [0, 1], "h3": [0]}

    def ask(_: LaunchConfig, host: str, __: object) -> Answer:
        return Answer(silence="timed out" if host in lost else "")

    monkeypatch.setattr(preflight, "ask", ask)
    launch = LaunchConfig(hostfile="hosts", master_addr="10.0.0.1")
    lost = {"h2"}
    assert remaining(launch, hosts) == (launch, {"h1": [0], "h3": [0]})
    lost = {"h1"}
    assert remaining(launch, hosts) == (LaunchConfig(hostfile="hosts"), {"h2": [0, 1], "h3": [0]})
    lost = set(hosts)
    with pytest.raises(MachineError, match="no host answers"):
        remaining(launch, hosts)


def test_filters_without_hostfile_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"launch\.hostfile"):
        hosts_of(LaunchConfig(include="h1"))


@pytest.mark.parametrize(("launcher", "program"), [("pdsh", "pdsh"), ("openmpi", "mpirun"), ("slurm", "srun")])
def test_a_launcher_that_is_not_installed_is_named(
    launcher: str, program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    Path("hosts").write_text("h1 slots=1\nh2 slots=1\n")
    with pytest.raises(MachineError, match=f"launch.launcher {launcher} needs {program}, which is not on the PATH"):
        launch(LaunchConfig(hostfile="hosts", launcher=launcher), ["train"], "run")  # type: ignore[arg-type]
