from vdr_cli.launch.ancestors import OVER_SSH, SUPERVISOR, Ancestor, launchers, missing

LAUNCH = Ancestor(10, "python3", ("/py", "-u", "-m", "deepspeed.launcher.launch", "--world_info=x"))
NODE = Ancestor(10, "python3", ("/py", "-u", "-m", "vdr_cli.launch.node", "--world_info=x"))
SUPERVISED_BY = Ancestor(9, "vdr", ("/py", "/env/bin/vdr", "train"))
RUNNER = Ancestor(8, "deepspeed", ("/py", "/env/bin/deepspeed", "--num_gpus", "2", "--module", "vdr_cli"))
TORCHRUN = Ancestor(8, "torchrun", ("/py", "/env/bin/torchrun", "-m", "vdr_cli"))
SCRIPT = Ancestor(7, "bash", ("bash", "start_vdr.sh"))
SHELL = Ancestor(6, "bash", ("-bash",))
REMOTE = Ancestor(5, "bash", ("bash", "-c", "export A=1; cd /x; /py -u -m deepspeed.launcher.launch --world_info=x"))
SSHD = Ancestor(4, "sshd", ("sshd: root@notty",))
LISTENER = Ancestor(3, "sshd", ("sshd: /usr/sbin/sshd [listener]",))
INIT = Ancestor(1, "init", ("/sbin/init",))


def test_the_chain_of_a_local_launch_ends_before_the_users_own_shell() -> None:
    assert launchers([LAUNCH, SUPERVISED_BY, SCRIPT, SHELL, SSHD, INIT]) == [LAUNCH, SUPERVISED_BY]
    assert launchers([NODE, SUPERVISED_BY, SHELL, INIT]) == [NODE, SUPERVISED_BY]
    assert launchers([LAUNCH, RUNNER, SHELL, INIT]) == [LAUNCH, RUNNER]
    assert launchers([TORCHRUN, SHELL, INIT]) == [TORCHRUN]


def test_over_ssh_the_connection_is_watched() -> None:
    assert launchers([LAUNCH, REMOTE, SSHD, LISTENER, INIT]) == [LAUNCH, REMOTE, SSHD]
    assert launchers([LAUNCH, SSHD, LISTENER, INIT]) == [LAUNCH, SSHD]
    assert launchers([LAUNCH, SUPERVISED_BY, SSHD, INIT]) == [LAUNCH, SUPERVISED_BY]


def test_without_a_launcher_nobody_is_watched() -> None:
    assert launchers([SHELL, SSHD, INIT]) == []
    assert launchers([SCRIPT, SHELL]) == []


def test_an_orphan_knows_that_it_is_one() -> None:
    assert missing([LAUNCH, SUPERVISED_BY], {SUPERVISOR: "9"}) is None
    assert missing([LAUNCH, INIT], {SUPERVISOR: "9"}) == Ancestor(9, "vdr", ())
    assert missing([LAUNCH, REMOTE, SSHD], {OVER_SSH: "1"}) is None
    assert missing([LAUNCH, INIT], {OVER_SSH: "1"}) is not None
    assert missing([SHELL], {}) is None
