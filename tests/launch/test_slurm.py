"""srun's variables about a task, and the scripts that start runs, with programs that only say how they were called."""

import os
import subprocess
from pathlib import Path

import pytest

from vdr_cli.config.schema import LaunchConfig
from vdr_cli.launch.reexec import hosts_of, make_plan, wants_ranks

SCRIPTS = Path(__file__).parents[2] / "scripts"
TASK_OF_NODE_1 = {
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "123456",
}


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in TASK_OF_NODE_1.items():
        monkeypatch.setenv(name, value)


def test_one_task_a_node_starts_the_ranks_of_its_own_node(task: None, tmp_path: Path) -> None:
    launch = LaunchConfig(num_processes=4)
    hosts = hosts_of(launch)
    assert wants_ranks(launch) and hosts == {"gpu07": [0, 1, 2, 3], "gpu08": [0, 1, 2, 3]}
    command = make_plan(launch, hosts, tmp_path, tmp_path).command(["train"])
    assert {"--node_rank=1", "--master_addr=gpu07", "--master_port=23456"} <= set(command)


@pytest.fixture
def programs(tmp_path: Path) -> dict[str, str]:
    """An environment in which `vdr` and `srun` print their arguments, and no other vdr is found."""
    for name in ("vdr", "srun"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho {name} "$@"\necho "$SRUN_CPUS_PER_TASK" >cpus\n')
        program.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    return {**kept, "PATH": f"{tmp_path}:/usr/bin:/bin"}


def run(script: str, *arguments: str, tmp_path: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A copy beside no virtual environment, so that the script takes vdr from the PATH."""
    copy = tmp_path / "scripts" / script
    copy.parent.mkdir(exist_ok=True)
    copy.write_text((SCRIPTS / script).read_text())
    command = ["bash", copy, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, check=False)


@pytest.mark.parametrize("script", ["slurm.sbatch", "study.sbatch", "grpo_train_multinode.sh"])
def test_a_task_gets_the_cores_that_the_job_asks_for(script: str, tmp_path: Path, programs: dict[str, str]) -> None:
    """srun does not take --cpus-per-task from sbatch since Slurm 22.05."""
    job = {**programs, "SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2"}
    run(script, tmp_path=tmp_path, env={**job, "SLURM_CPUS_PER_TASK": "64"})
    assert (tmp_path / "cpus").read_text() == "64\n"
    run(script, tmp_path=tmp_path, env=job)
    assert (tmp_path / "cpus").read_text() == "\n"


def test_the_example_over_a_hostfile_or_an_allocation(tmp_path: Path, programs: dict[str, str]) -> None:
    script = "grpo_train_multinode.sh"
    example = "train --mode end_of_sequence --ds-config zero3"
    said = run(script, "--hostfile", "hosts", "--output", "a b", tmp_path=tmp_path, env=programs)
    assert said.stdout.split() == ["vdr", *example.split(), "--hostfile", "hosts", "--output", "a", "b"]
    inside = {**programs, "SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "8"}
    said = run(script, "--output", "o", tmp_path=tmp_path, env=inside)
    assert said.stdout.strip() == (
        f"srun --kill-on-bad-exit=1 --ntasks-per-node=1 vdr {example} --num-processes 8 --output o"
    )
    said = run(script, tmp_path=tmp_path, env=programs)
    assert said.returncode == 2 and "--hostfile" in said.stderr


def test_the_batch_script_is_one_task_a_node_that_goes_on(tmp_path: Path, programs: dict[str, str]) -> None:
    said = run("slurm.sbatch", "run.yaml", "--output", "o", tmp_path=tmp_path, env=programs)
    assert said.stdout.strip() == (
        "srun --kill-on-bad-exit=1 vdr train run.yaml --output o --num-processes 8 --resume auto"
    )
    assert "#SBATCH --ntasks-per-node=1" in (SCRIPTS / "slurm.sbatch").read_text()


def test_a_task_of_an_array_runs_its_part_of_a_study(tmp_path: Path, programs: dict[str, str]) -> None:
    task = {**programs, "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "16"}
    said = run("study.sbatch", "study.yaml", "--jobs", "4", tmp_path=tmp_path, env=task)
    assert said.stdout.strip() == "srun --kill-on-bad-exit=1 vdr study study.yaml --jobs 4 --shard 3/16"
    said = run("study.sbatch", "study.yaml", tmp_path=tmp_path, env=programs)
    assert said.returncode != 0 and "submit it as an array" in said.stderr
