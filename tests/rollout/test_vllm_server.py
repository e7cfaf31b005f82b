"""A vLLM server as a child: its command, its environment, and how its end is told. A script stands for vLLM."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

from vdr_cli.errors import ConfigError, MachineError
from vdr_cli.rollout import in_vllm
from vdr_cli.rollout.vllm_server import VllmServer

SAYS_HOW_IT_WAS_STARTED = """#!{python}
import json, os, sys
print(json.dumps([sys.argv[1:], dict(os.environ)]), flush=True)
"""
WAITS = "#!{python}\nimport time\ntime.sleep(600)\n"


def interpreter(folder: Path, program: str) -> str:
    path = folder / "python"
    path.write_text(program.format(python=sys.executable))
    path.chmod(0o755)
    return str(path)


def server(folder: Path, program: str, **more: bool) -> VllmServer:
    options = {"on_cpu": True, "receives": False, **more}
    return VllmServer(
        interpreter(folder, program), "http://127.0.0.1:8123", folder, "float32", ["--seed", "1"], **options
    )


def test_command_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    started = server(tmp_path, SAYS_HOW_IT_WAS_STARTED, receives=True)
    assert started.process.wait(60) == 0
    command, environment = json.loads(started.log.read_text())
    assert command[:4] == ["-m", "vllm.entrypoints.openai.api_server", "--model", str(tmp_path)]
    said = dict(itertools.pairwise(command))
    assert said["--host"] == "127.0.0.1" and said["--port"] == "8123" and said["--dtype"] == "float32"
    assert said["--logprobs-mode"] == "processed_logprobs" and said["--seed"] == "1"
    assert "--enforce-eager" in command and said["--worker-extension-cls"] == "vdr_weights.Receiver"
    assert "RANK" not in environment and "WORLD_SIZE" not in environment, "it is none of our ranks"
    assert environment["VLLM_SERVER_DEV_MODE"] == "1" and environment["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert environment["PYTHONPATH"] == str(Path(in_vllm.__file__).parent)


def test_a_server_on_a_gpu_gets_what_the_trainer_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (48 << 30, 80 << 30))
    started = server(tmp_path, SAYS_HOW_IT_WAS_STARTED, on_cpu=False, sleeps=True)
    assert started.process.wait(60) == 0
    command, _ = json.loads(started.log.read_text())
    assert "--enable-sleep-mode" in command and "--enforce-eager" not in command
    assert command[command.index("--gpu-memory-utilization") + 1] == "0.55"
    with pytest.raises(ConfigError, match=r"vllm\.sleep: vLLM frees its memory on GPUs only"):
        server(tmp_path, WAITS, on_cpu=True, sleeps=True)


def test_the_end_of_a_server_is_told_with_its_last_line(tmp_path: Path) -> None:
    ended = server(tmp_path, "#!{python}\nprint('no memory')\nraise SystemExit(3)\n")
    ended.process.wait(60)
    assert ended.ended() == f"it ended with code 3; last line of {tmp_path / 'server.log'}: no memory"


def test_a_running_server_is_stopped(tmp_path: Path) -> None:
    running = server(tmp_path, WAITS)
    assert running.ended() == ""
    running.stop()
    assert running.process.poll() is not None
    running.stop()  # once more is harmless


def test_what_is_no_interpreter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rollout.vllm.python: .*none is not an interpreter"):
        VllmServer(str(tmp_path / "none"), "http://127.0.0.1:1", tmp_path, "float32", [], True, False)
    with pytest.raises(MachineError, match=r"rollout.vllm.python: .*python could not be started"):
        server(tmp_path, "#!/no/such/interpreter\n")
