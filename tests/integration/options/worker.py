"""Ranks that work through several training runs in one process each, with faults planted and numbers taken down.

    python worker.py FOLDER    its jobs.json is a list of {ranks, runs: a list of {name, settings, resume, plant}}

The ranks are forks of this process, which imports once what they need. Each writes log_<ranks>_<rank>.

Beside what each run writes, rank r leaves `probe_rank<r>.pt`: what every loss was given and returned, gathers
a step, and logits of the last policy and of its reference.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from vdr_cli.system.imports import importing

with importing():
    import deepspeed
    import torch
    from deepspeed.utils import safe_get_full_grad
    from torch.nn.functional import pad

    from vdr_cli import train
    from vdr_cli.config.load import load_config
    from vdr_cli.disagreement import reader
    from vdr_cli.engine import build, checkpoint, collectives
    from vdr_cli.engine.engine import Engine
    from vdr_cli.engine.processes import leave_process_group
    from vdr_cli.errors import VdrError
    from vdr_cli.launch.environment import free_port
    from vdr_cli.models import cpu_linear, limits
    from vdr_cli.system.processes import end_process
    from vdr_cli.training import opening
    from vdr_cli.training.checkpointer import Checkpointer
    from vdr_cli.training.state import LoopState

LEAST_WORK = cpu_linear.LEAST_WORK
PROMPT = torch.tensor([[3, 4, 5, 6, 7, 8]])
gathers, gathered_bytes = 0, 0
plant: str | None = None
calls: list[dict[str, Any]] = []
gathers_at_step_end: list[tuple[int, int]] = []
gradient: dict[str, torch.Tensor] = {}


def counted(function: Any) -> Any:
    def call(output: Any, *args: Any, **kwargs: Any) -> Any:
        global gathers, gathered_bytes
        gathers += 1
        gathered_bytes += sum(part.nbytes for part in (output if isinstance(output, list) else [output]))
        return function(output, *args, **kwargs)

    return call


def watched_loss(policy: Any, inputs: Any, cfg: Any) -> Any:
    output = policy_loss(policy, inputs, cfg)
    given = (policy._asdict() | vars(inputs)).items()
    calls.append({name: value.detach() for name, value in given if value is not None} | {"loss": output.loss.detach()})
    if plant in ("nan", "inf") and collectives.rank() == collectives.world_size() - 1:
        output = dataclasses.replace(output, loss=output.loss * math.nan if plant == "nan" else output.loss + math.inf)
    return output


def watched_micro_batches(completions: Any, inputs: Any, *rest: Any) -> list[Any]:
    if plant == "shuffled":
        order = torch.randperm(len(inputs.mask), generator=torch.Generator().manual_seed(1))
        completions, inputs = completions.rows(order), inputs.map(lambda tensor: tensor[order])
    micro_batches = micro_batches_of(completions, inputs, *rest)
    return [widened(micro) for micro in micro_batches] if plant == "padded" else micro_batches


def widened(micro: Any) -> Any:
    """The micro-batch with three columns of padding before the prompts and two after the completions."""
    *prompt, ids, mask = micro.tokens
    tokens = (*(pad(part, (3, 0)) for part in prompt), pad(ids, (0, 2)), pad(mask, (0, 2)))
    inputs, policy_mask = micro.inputs.map(lambda tensor: pad(tensor, (0, 2))), pad(micro.policy_mask, (0, 2))
    return dataclasses.replace(micro, tokens=tokens, policy_mask=policy_mask, inputs=inputs)


def watched_mask(mask: Any, truncated: Any, mask_truncated: bool) -> Any:
    mask = loss_mask(mask, truncated, mask_truncated)
    return mask & False if plant == "masked" and collectives.rank() == 0 else mask


def watched_cache(*args: Any) -> Any:
    return None if plant == "unrecorded" else cache_for(*args)


def watched_end_step(self: Any, steps: int, **spent: float) -> None:
    gathers_at_step_end.append((gathers, gathered_bytes))
    end_step(self, steps, **spent)


def watched_step(self: Any, learning_rate: float) -> Any:
    if not gradient:
        gradient.update(
            {name: safe_get_full_grad(p) for name, p in self.causal_lm.named_parameters() if p.requires_grad}
        )
    return step(self, learning_rate)


def probed_complete(self: Any) -> None:
    found = {"calls": list(calls), "gathers": list(gathers_at_step_end), "gradient": dict(gradient)}
    res = self.resources
    with res.engine.gathered_model() as model:
        found["logits"] = model(input_ids=PROMPT).logits
        if res.reference is not None:
            with res.reference.whole(model) as reference:
                found["reference"] = reference(input_ids=PROMPT).logits
    torch.save(found, res.directory / f"probe_rank{collectives.rank()}.pt")
    complete(self)


def saved_if_asked(self: Any, state: Any) -> None:
    """No checkpoint at the end of a run that asks for none: nobody reads it."""
    if self._resources.config.train.checkpoint_every:
        save(self, state)


def serve_conversions(requests: int, answers: int) -> NoReturn:
    """DeepSpeed's converter in forks of this process: alone it imports for seconds. Lines in, exit codes out."""
    converter = importlib.import_module("deepspeed.checkpoint.ds_to_universal")
    with os.fdopen(requests) as lines, os.fdopen(answers, "w") as codes:
        for line in lines:
            child = os.fork()
            if child == 0:
                sys.argv = ["ds_to_universal", *json.loads(line)]
                try:
                    converter.main(converter.parse_arguments())
                except BaseException:
                    traceback.print_exc()
                    end_process(1)
                end_process(0)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=codes, flush=True)
    end_process(0)


def converted_in_a_fork(command: list[str], **streams: Any) -> subprocess.CompletedProcess[str]:
    """In the place of subprocess.run in engine/checkpoint.py; `command` is python -m MODULE and its arguments."""
    os.write(conversions[1], json.dumps(command[3:]).encode() + b"\n")
    code = int(os.read(conversions[2], 16))
    return subprocess.CompletedProcess(command, code, "", f"exit code {code}")


def sampled_here(config: Any, *more: Any) -> Any:
    """A sampler in this process for both backends: what is tested of rollout.ahead is the loop's part of it."""
    return open_rollout(config.model_copy(update={"backend": "transformers"}), *more)


for name in ("allgather_fn", "all_gather_into_tensor", "all_gather"):
    setattr(deepspeed.comm, name, counted(getattr(deepspeed.comm, name)))
policy_loss, train.policy_loss = train.policy_loss, watched_loss
micro_batches_of, train.micro_batches_of = train.micro_batches_of, watched_micro_batches
loss_mask, train.loss_mask = train.loss_mask, watched_mask
cache_for, reader.cache_for = reader.cache_for, watched_cache
end_step, LoopState.end_step = LoopState.end_step, watched_end_step
step, Engine.step = Engine.step, watched_step
open_rollout, opening.open_rollout = opening.open_rollout, sampled_here
complete, opening.Run.complete = opening.Run.complete, probed_complete
save, Checkpointer.save = Checkpointer.save, saved_if_asked
checkpoint.subprocess = SimpleNamespace(run=converted_in_a_fork)  # type: ignore[assignment]


def work_through(runs: list[dict[str, Any]]) -> None:
    global plant
    for entry in runs:
        plant = entry["plant"]
        calls.clear()
        gathers_at_step_end.clear()
        gradient.clear()
        build.TREE_TOKENS = 0 if plant == "two_passes" else limits.TREE_TOKENS
        cpu_linear.LEAST_WORK = 1 if plant == "onednn" else LEAST_WORK
        overrides = [f"{key}={json.dumps(value)}" for key, value in entry["settings"].items()]
        try:
            ended: Any = train.train(load_config(None, overrides), entry["resume"])
        except VdrError as error:
            ended = f"{type(error).__name__}: {error}"
        print("ended", entry["name"], ended, flush=True)
    leave_process_group()


def be_rank(rank: int, ranks: int, port: int, runs: list[dict[str, Any]]) -> NoReturn:
    log = os.open(f"{sys.argv[1]}/log_{ranks}_{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    code = 1
    try:
        torch.set_num_threads(1)
        work_through(runs)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        end_process(code)


def do(ranks: int, runs: list[dict[str, Any]]) -> bool:
    """True if every rank came to its end. The first that does not ends the others."""
    port = free_port()
    children = set()
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            be_rank(rank, ranks, port, runs)
        children.add(child)
    while children:
        ended, status = os.wait()
        children.remove(ended)
        if status:
            for child in children:
                os.kill(child, signal.SIGKILL)
            return False
    return True


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1], "jobs.json").read_text())
    conversions = [*os.pipe(), *os.pipe()]
    if os.fork() == 0:
        for end in (conversions[1], conversions[2]):
            os.close(end)
        serve_conversions(conversions[0], conversions[3])
    sys.exit(not all(do(**job) for job in jobs))
