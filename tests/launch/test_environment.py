import pytest

from vdr_cli.errors import ConfigError
from vdr_cli.launch.environment import (
    checked,
    environment_file_text,
    expand_nodelist,
    single_process,
    threads_per_process,
    translated,
    travelling,
)
from vdr_cli.launch.rank import is_rank, processes_started

SRUN = {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "123456",
}


def test_a_single_process_tells_itself() -> None:
    environment = single_process()
    assert processes_started(environment) == 1 and is_rank(environment)
    assert 1024 < int(environment["MASTER_PORT"]) < 65536


def test_srun_is_understood() -> None:
    assert translated(SRUN) == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "23456",
    }


@pytest.mark.parametrize(
    ("visible", "local_rank"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0"}, "0"),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "1"),  # --gpu-bind=none
        ({"CUDA_VISIBLE_DEVICES": ""}, "1"),
        ({}, "1"),
    ],
)
def test_a_task_that_srun_shows_its_own_gpu_alone_numbers_it_from_0(visible: dict[str, str], local_rank: str) -> None:
    assert translated({**SRUN, "SLURM_GPUS_PER_TASK": "a100:1", **visible})["LOCAL_RANK"] == local_rank


def test_a_batch_script_is_not_a_rank() -> None:
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "gpu[07-08]"}
    assert translated(batch) == {}
    assert translated({**SRUN, "RANK": "0", "WORLD_SIZE": "2"}) == {}


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID", "OMPI_COMM_WORLD_SIZE"])
def test_a_number_of_a_launcher_that_is_none_is_named(name: str) -> None:
    environment = {"OMPI_COMM_WORLD_SIZE": "2"} if name.startswith("OMPI") else SRUN
    with pytest.raises(ConfigError, match=rf"^the environment variable {name} is 'x', not a whole number \("):
        translated({**environment, name: "x"})


def test_mpirun_is_understood() -> None:
    mpi = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    assert translated({**mpi, "MASTER_ADDR": "h1"})["RANK"] == "1"
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        translated(mpi)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("a", ["a"]),
        ("a,b-2", ["a", "b-2"]),
        ("a[01-03,7],b", ["a01", "a02", "a03", "a7", "b"]),
        ("r[1-2]n[09-10]", ["r1n09", "r1n10", "r2n09", "r2n10"]),
    ],
)
def test_nodelists(text: str, hosts: list[str]) -> None:
    assert expand_nodelist(text) == hosts


@pytest.mark.parametrize(
    "value", ["$(reboot)", "`reboot`", "a;b", "a\nb", 'a"b', "a\\b", "a|b", "a&b", "%n", "a>b", "!x"]
)
def test_values_that_a_shell_reads_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"launch\.env\.NAME"):
        checked({"NAME": value})


@pytest.mark.parametrize("name", ["", "A B", "A;B", "1A", "A=B", "$A"])
def test_names_that_are_not_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"launch\.env"):
        checked({name: "1"})


def test_what_travels() -> None:
    environ = {
        "HF_HOME": "/data/hf",
        "HF_TOKEN": "hf_secret",
        "WANDB_API_KEY": "secret",
        "OMP_NUM_THREADS": "4",
        "NCCL_SOCKET_IFNAME": "^docker0,lo",
        "HOME": "/root; rm",
        "VDR_SUPERVISOR": "17",
    }
    assert travelling(environ, {"OMP_NUM_THREADS": "2", "HF_TOKEN": "asked-for"}) == {
        "HF_HOME": "/data/hf",
        "OMP_NUM_THREADS": "2",
        "HF_TOKEN": "asked-for",
    }


@pytest.mark.parametrize("name", ["HF_HOME", "NCCL_DEBUG_FILE", "PYTHONPATH"])
def test_an_inherited_value_that_a_shell_reads_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"the environment variable {name}"):
        travelling({name: "$(reboot)"}, {})


def test_the_file_reads_back_in_deepspeed_s_reader() -> None:
    lines = environment_file_text({"A": "1", "B": "x=y z"}).splitlines(keepends=True)
    assert [line.split("=", maxsplit=1) for line in lines] == [["A", "1\n"], ["B", "x=y z\n"]]


def test_threads_are_shared_between_processes() -> None:
    alone, crowded = threads_per_process({}), threads_per_process({"LOCAL_SIZE": "1024"})
    assert alone >= 1
    assert crowded == 1
