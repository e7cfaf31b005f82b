"""Real engines and real runs on the device: each in processes of their own, several beside each other."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
SETTINGS = {
    "rollout.group_size": 4,
    "rollout.max_new_tokens": 12,
    "train.prompts_per_step": 2,
    "train.micro_batch_size": 4,
    "train.checkpoint_every": 1,
    "train.steps": 2,
    "train.keep_last": 5,
    "disagreement.members": 4,
    "observe.tensorboard": False,
    "observe.completions_every": 1,
    "observe.report": False,
}
CLOCKED = ("time/", "step_time", "tokens_per_second", "mfu/")
"""Metrics of which the clock is a part."""


def environment(device: torch.device) -> dict[str, str]:
    """The environment of a process on this device that is no rank."""
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    # on a machine with a GPU the CPU's processes must not see it
    hidden = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if device.type == "cpu" else {}
    found = os.pathsep.join([str(HERE.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return env | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": found, **hidden}


Start = Callable[..., subprocess.CompletedProcess[str]]
"""Runs `vdr`, or the program that the first argument names, to the end."""


@pytest.fixture
def start(place: tuple[torch.device, str], forked: Start) -> Start:
    """On a GPU in a process of its own; on the CPU in a fork, one after the other."""
    device = place[0]

    def process(*arguments: str) -> subprocess.CompletedProcess[str]:
        program = [] if arguments[0].endswith(".py") else ["-m", "vdr_cli"]
        command = [sys.executable, *program, *arguments]
        return subprocess.run(
            command, env=environment(device), capture_output=True, text=True, timeout=240, check=False
        )

    def fork(*arguments: str) -> subprocess.CompletedProcess[str]:
        return forked(*arguments, CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")

    return process if device.type == "cuda" else fork


def well(done: subprocess.CompletedProcess[str]) -> None:
    """AssertionError with what it said when it failed."""
    assert done.returncode == 0, f"{done.args}\n{done.stdout[-1500:]}\n{done.stderr[-4000:]}"


def engine(folder: Path, start: Start, dtype: str) -> dict[str, Any]:
    """The results of engine_worker.py."""
    folder.mkdir()
    well(start(str(HERE / "engine_worker.py"), str(folder), dtype))
    return json.loads((folder / "found.json").read_text())  # type: ignore[no-any-return]


def train(output: Path, start: Start, dtype: str, *flags: str) -> Path:
    """`vdr train` of the starter."""
    zero3 = output.parent / "zero3.json"
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": "auto"}
    zero3.write_text(json.dumps({"zero_optimization": zero | {"stage3_prefetch_bucket_size": "auto"}}))
    values = {**SETTINGS, "model.dtype": dtype, "engine.ds_config": str(zero3)}
    settings = [word for key, value in values.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    well(start("train", "--output", str(output), *settings, *flags))
    return output


def runs(folder: Path, start: Start, dtype: str, pool: ThreadPoolExecutor) -> list[Path]:
    """A run, the same run again, and one resumed from the first one's middle."""
    folder.mkdir()
    whole, again = (pool.submit(train, folder / name, start, dtype) for name in ("whole", "again"))
    middle = str(whole.result() / "checkpoints" / "step_000001")
    resumed = train(folder / "resumed", start, dtype, "--resume", middle)
    return [whole.result(), again.result(), resumed]


_begun: dict[str, Future[Any]] = {}


def begin(dtypes: Sequence[str], device: torch.device, folder: Path, start: Start) -> None:
    """Start everything that has not been started on this device, as much at once as there are cores for."""
    starters = ThreadPoolExecutor(max_workers=len(dtypes))
    pool = ThreadPoolExecutor(max_workers=max(2, min(len(os.sched_getaffinity(0)), 8)))
    for dtype in dtypes:
        into = folder / f"{device.type}_{dtype}"
        into.mkdir()
        _begun[f"runs {device.type} {dtype}"] = starters.submit(runs, into / "runs", start, dtype, pool)
        _begun[f"engine {device.type} {dtype}"] = pool.submit(engine, into / "engine", start, dtype)


@pytest.fixture
def result(
    place: tuple[torch.device, str], start: Start, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Any]:
    """result("engine" | "runs"): what the processes on this device and in this dtype gave."""
    device, dtype = place
    if f"engine {device.type} {dtype}" not in _begun:
        dtypes = ("float32", "bfloat16") if device.type == "cuda" else (dtype,)
        begin(dtypes, device, tmp_path_factory.mktemp("processes"), start)
    return lambda kind: _begun[f"{kind} {device.type} {dtype}"].result()


def test_the_twin_is_the_policy(result: Callable, place: tuple[torch.device, str]) -> None:
    found = result("engine")
    assert found["device"] == found["device of the shards"] == place[0].type
    assert found["furthest apart"] < (1e-5 if place[1] == "float32" else 0.05)
    assert found["twin is the policy"], f"to the last bit, not within {found['furthest apart']:.2g}"


def test_a_step_is_torchs(result: Callable, place: tuple[torch.device, str]) -> None:
    """Float32: to rounding. bfloat16: the update is rounded to what a weight of 0.1 can show, 2^-9 of it."""
    found, exact = result("engine"), place[1] == "float32"
    assert found["grad norm"] == pytest.approx(1.0, rel=1e-4 if exact else 0.02)
    assert found["update error"] < (1e-4 if exact else 0.1)
    assert found["stage 2 update error"] < (1e-4 if exact else 0.1)


def test_a_step_that_is_not_finite_is_refused(result: Callable) -> None:
    assert result("engine")["refused"] == [True, True, True]


def test_an_engine_repeats_itself_and_resumes_to_the_bit(result: Callable) -> None:
    found = result("engine")
    assert found["run to run"] and found["loaded"]
    assert found["resumed"] == [True, True, True]


def test_a_run_repeats_itself_to_the_bit(result: Callable) -> None:
    whole, again, _ = result("runs")
    first, second = metrics(whole), metrics(again)
    assert [line["step"] for line in first] == [1, 2]
    assert first[0]["reward_std"] > 0 or first[0]["disagreement/mean"] > 0
    assert first[-1]["ratio/max"] == 1.0
    for one, other in zip(first, second, strict=True):
        assert {name: (value, other[name]) for name, value in one.items() if other[name] != value} == {}
    assert differing(whole, again) == []


def test_a_resumed_run_is_the_same_run_to_the_bit(result: Callable) -> None:
    whole, _, resumed = result("runs")
    (last,), expected = metrics(resumed), metrics(whole)[-1]
    assert {name: (value, last[name]) for name, value in expected.items() if last[name] != value} == {}
    assert differing(whole, resumed) == []


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what the clock says."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(CLOCKED)} for line in lines]


def differing(one: Path, other: Path) -> list[str]:
    """Names of the weights that are not the same to the bit."""
    from safetensors.torch import load_file

    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (one, other))
    assert ours.keys() == theirs.keys()
    return [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]


PAIR = """
import sys
from datetime import timedelta
import torch
from torch.distributed import TCPStore
sys.path[:0] = sys.argv[4:]
from gpu_reference import tiny
from vdr_cli.rollout.in_vllm.vdr_weights import broadcast, open_group
from vdr_cli.rollout.weights import checksum, served_weights

rank, port, backend = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
if backend == "nccl":
    torch.cuda.set_device(device)
store = TCPStore("127.0.0.1", port, 2, is_master=rank == 0, timeout=timedelta(seconds=60))
group = open_group(store, "127.0.0.1", rank, 2, backend, 60.0)
for dtype in (torch.float32, torch.bfloat16):
    model = tiny().to(device, dtype)
    expected = checksum(model)
    if rank == 1:
        for parameter in model.parameters():
            parameter.data.zero_()
    for tensor in served_weights(model).values():
        broadcast(group, tensor).wait()
    if backend == "nccl":
        torch.cuda.synchronize()
    assert checksum(model) == expected, (rank, dtype)
store.set(f"done {rank}", "yes")
store.wait(["done 0", "done 1"])
"""


def test_weights_are_broadcast_between_two_devices(device: torch.device) -> None:
    """NCCL between two GPUs; the dry run is gloo between two processes."""
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("NCCL needs two GPUs for two processes")
    backend = "nccl" if device.type == "cuda" else "gloo"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    places = [str(HERE), str(HERE.parent.parent)]
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", PAIR, str(rank), port, backend, *places],
            env=environment(device),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said[0][-2000:] + said[1][-2000:]
