"""Settings of the machine: engine, launch and display."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from vdr_cli.config.paths import PathText
from vdr_cli.config.sections.base import Positive, Section


class EngineConfig(Section):
    ds_config: PathText = "zero3"
    """DeepSpeed configuration: zero1, zero2, zero3, zero3_offload, zero3_hpz, zeropp, superoffload, or a path to a JSON
    file."""
    sequence_parallel: Positive = 1
    """Number of neighbouring ranks that share each completion (Ulysses), in the update and whenever policy, reference
    or members read it: with N, each rank keeps 1/N of a row's activations. It must divide the number of processes and
    the model's attention heads. 1: every rank holds whole rows."""
    gather: Literal["auto", "whole", "layer"] = "auto"
    """Unit in which ZeRO-3 gathers weights for reading. whole: a full copy on every device during rollout and
    disagreement. layer: one decoder layer at a time, for models whose full copy does not fit; vLLM then samples and
    receives the weights layer by layer. auto: layer on GPUs where a full copy would take most of the memory, otherwise
    whole."""


class LaunchConfig(Section):
    """Launch of the ranks. These settings never change what a run computes."""

    num_processes: Positive | None = None
    """Processes on this machine, or per host with a hostfile. None: one, or every slot of the hostfile."""
    hostfile: PathText | None = None
    """File with one line per host, such as `node1 slots=8`. None: this machine."""
    include: str | None = None
    """Hosts and slots to use, in DeepSpeed's syntax: host1@host2:0,2."""
    exclude: str | None = None
    """Hosts and slots to leave out, in the same syntax."""
    master_addr: str | None = None
    """Address on which rank 0 listens. None: the first host."""
    master_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Port on which rank 0 listens. None: a free port on this machine, or 29500 with a hostfile."""
    ssh_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Port of sshd on every host. None: the port that ssh is configured to use."""
    launcher: Literal["pdsh", "openmpi", "slurm"] = "pdsh"
    """Launcher that starts the processes on the hosts."""
    no_ssh: bool = False
    """Do not use ssh: you start vdr once on every host, with node_rank."""
    node_rank: Annotated[int, Field(ge=0)] | None = None
    """This host's position in the hostfile, from 0 (with no_ssh)."""
    env: dict[str, str] = {}
    """Environment variables to set on every rank; integers are converted to strings."""
    max_restarts: Annotated[int, Field(ge=0)] = 0
    """Restarts from the newest checkpoint after a fault, at most."""
    drop_lost_hosts: bool = False
    """Leave out hosts that do not answer at a restart, and use fewer processes."""
    fault_timeout: Annotated[float, Field(gt=0)] = 60.0
    """Seconds within which every process ends once a fault is noticed. After Ctrl-C or SIGTERM, the step in progress
    and its checkpoint have this time and twice the longest step so far; if they take longer, they are lost."""
    check_hosts: bool = True
    """With a hostfile: check that every host is reachable and has the same versions before anything starts."""

    @field_validator("env", mode="before")
    @classmethod
    def _whole_numbers_as_text(cls, env: Any) -> Any:
        if not isinstance(env, dict):
            return env
        return {name: str(value) if type(value) is int else value for name, value in env.items()}


class ObserveConfig(Section):
    live: Literal["auto", "on", "off"] = "auto"
    """Show the live view. auto: only on a terminal; elsewhere print one line per step."""
    completions_every: Annotated[int, Field(ge=0)] = 10
    """Steps between completions/step_*.parquet files; 0: none."""
    audit_every: Annotated[int, Field(ge=0)] | None = None
    """Steps between audit/step_*.parquet files, from which `vdr audit` recomputes a step; the first step is always
    included. None: only the first step, which needs no checkpoint and takes a few MB at most. 0: none."""
    tensorboard: bool = True
    """Write events for TensorBoard."""
    wandb: bool = False
    """Log to Weights & Biases (extra: wandb)."""
    report: bool = True
    """Write report.html at the end of the run."""
