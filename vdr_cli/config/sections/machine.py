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
    """Neighbouring ranks that hold parts of the same completions (Ulysses) in the update and where policy, reference
    and members read them, so that each keeps this fraction of a row's activations; a divisor of the processes and of
    the model's heads. 1: whole rows on every rank."""
    gather: Literal["auto", "whole", "layer"] = "auto"
    """The way weights are gathered under ZeRO-3 to be read. whole: a full copy on every device during rollout and
    disagreement. layer: one decoder layer at a time, for models whose full copy does not fit; vLLM samples, and is sent
    the weights layer by layer. auto: layer on GPUs where a full copy would take most of the memory, else whole."""


class LaunchConfig(Section):
    """The start of the ranks. Never part of what a run computes."""

    num_processes: Positive | None = None
    """Processes on this machine. None: one, or every slot of the hostfile."""
    hostfile: PathText | None = None
    """File with one line per host, such as `node1 slots=8`. None: this machine."""
    include: str | None = None
    """Hosts and slots to use, in DeepSpeed's syntax: host1@host2:0,2."""
    exclude: str | None = None
    """Hosts and slots to leave out, in the same syntax."""
    master_addr: str | None = None
    """Address where rank 0 listens. None: the first host."""
    master_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Port where rank 0 listens. None: a free one on this machine, 29500 with a hostfile."""
    ssh_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Port of the hosts' sshd. None: as ssh is configured."""
    launcher: Literal["pdsh", "openmpi", "slurm"] = "pdsh"
    """The launcher that starts processes on the hosts."""
    no_ssh: bool = False
    """Do not use ssh: you start vdr once on every host, with node_rank."""
    node_rank: Annotated[int, Field(ge=0)] | None = None
    """This host's position in the hostfile, from 0 (with no_ssh)."""
    env: dict[str, str] = {}
    """Environment variables that every rank gets; integers are converted to strings."""
    max_restarts: Annotated[int, Field(ge=0)] = 0
    """Times a run is restarted from its newest checkpoint after a fault."""
    drop_lost_hosts: bool = False
    """Restart without hosts that do not answer, with fewer processes."""
    fault_timeout: Annotated[float, Field(gt=0)] = 60.0
    """Seconds within which every process ends after a fault is noticed."""
    check_hosts: bool = True
    """With a hostfile: every host reachable, same versions, before anything starts."""

    @field_validator("env", mode="before")
    @classmethod
    def _whole_numbers_as_text(cls, env: Any) -> Any:
        if not isinstance(env, dict):
            return env
        return {name: str(value) if type(value) is int else value for name, value in env.items()}


class ObserveConfig(Section):
    live: Literal["auto", "on", "off"] = "auto"
    """Live view. auto: on a terminal; elsewhere one line per step."""
    completions_every: Annotated[int, Field(ge=0)] = 10
    """Steps between files completions/step_*.parquet; 0: none."""
    audit_every: Annotated[int, Field(ge=0)] | None = None
    """Steps between audit/step_*.parquet, from which `vdr audit` recomputes a step; the first step is always included.
    None: the first step alone, which needs no checkpoint and costs at most a few MB; 0: none."""
    tensorboard: bool = True
    """Write events for TensorBoard."""
    wandb: bool = False
    """Log to Weights & Biases (extra: wandb)."""
    report: bool = True
    """Write report.html at the end."""
