"""A server that speaks vLLM's part of HTTP that we use, on a tiny model, with faults to plant; and its client."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from vdr_cli.config import RolloutConfig
from vdr_cli.rollout.base import RolloutRequest
from vdr_cli.rollout.in_vllm.vdr_weights import Receiver
from vdr_cli.rollout.transformers_backend import TransformersRollout
from vdr_cli.rollout.vllm_backend import VllmRollout
from vdr_cli.samples import Sampling

PROMPTS = [[5, 6, 7, 8], [9], [10, 11]]
KEYS = [2**62 + 11, 22, 33]


class FakeWorker(Receiver):
    """The stand-in for vLLM's worker class; with two of them each loads all of the model."""

    def __init__(self, server: FakeVllm, rank: int) -> None:
        self.server, self.rank, self.device = server, rank, torch.device("cpu")
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=server.copies))

    def reload_weights(self, weights_iterator: Iterable[tuple[str, torch.Tensor]]) -> None:  # type: ignore[override]
        arrived = {}
        for name, tensor in weights_iterator:
            arrived[name] = tensor
            if self.server.breaks:
                raise RuntimeError("planted in the middle")
        self.server.broadcasts += 1
        if not self.server.stale:
            kept = ["lm_head.weight"] if self.server.keeps_head else []
            given = {name: tensor for name, tensor in arrived.items() if name not in kept}
            assert self.server.model.load_state_dict(given, strict=False).missing_keys == kept


class FakeVllm:
    """A vLLM server's work with weights and prompts, and its faults."""

    def __init__(self) -> None:
        self.model: Any = None
        self.version = "0.32.0"
        self.max_model_len = 512
        self.reloads = self.broadcasts = self.completions = 0
        self.workers, self.copies = 1, 1
        self.receives = True
        """Was started with vdr's worker extension."""
        self.breaks = False
        """A worker raises after the first tensor of a broadcast."""
        self.joined: list[FakeWorker] = []
        self.stale = False
        """Says yes to a reload and keeps the old weights."""
        self.keeps_head = False
        """Reloads everything but the LM head."""
        self.raw_logps = False
        """Returns log-probabilities before the temperature."""
        self.fails = 0
        """Answers this many completions with 500."""
        self.development = True
        self.asleep: set[str] = set()
        """The parts without memory: weights, kv_cache."""
        self.naps = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply(*server.get(self.path))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.reply(*server.post(self.path, body))

            def reply(self, status: int, answer: dict[str, Any]) -> None:
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = False  # a stopped server has no thread left
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def get(self, path: str) -> tuple[int, dict[str, Any]]:
        if path == "/version":
            return 200, {"version": self.version}
        if path == "/v1/models":
            return 200, {"data": [{"id": "tiny", "max_model_len": self.max_model_len}]}
        return (200, {}) if path == "/health" else (404, {})

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if path == "/v1/completions":
            with self.lock:
                return (500, {"error": f"no memory for {self.asleep}"}) if self.asleep else self.complete(body)
        if path == "/sleep?level=2" and self.development:
            self.asleep, self.naps = {"weights", "kv_cache"}, self.naps + 1
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.fill_(torch.nan)
            return 200, {}
        if path.startswith("/wake_up?tags=") and self.development:
            self.asleep -= {path.partition("=")[2]}
            return 200, {}
        if path == "/collective_rpc" and self.development:
            return self.call(body["method"], body["kwargs"])
        return (200, {}) if path == "/reset_prefix_cache" else (404, {"detail": "Not Found"})

    def call(self, method: str, arguments: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if method in ("reload_weights", "vdr_receive") and "weights" in self.asleep:
            return 500, {"error": "no memory for the weights"}
        if method == "reload_weights":
            self.reload(arguments["weights_path"])
            return 200, {}
        if not self.receives:
            return 500, {"error": f"'Worker' object has no attribute '{method}'"}
        if not self.joined:
            self.joined = [FakeWorker(self, rank) for rank in range(self.workers)]
        with ThreadPoolExecutor(self.workers) as pool:
            calls = [pool.submit(getattr(worker, method), **arguments) for worker in self.joined]
        errors = [str(call.exception()) for call in calls if call.exception()]
        return (500, {"error": errors[0]}) if errors else (200, {"results": [call.result() for call in calls]})

    def reload(self, directory: str) -> None:
        self.reloads += 1
        if self.stale and self.model is not None:
            return
        old = self.model
        self.model = AutoModelForCausalLM.from_pretrained(directory).eval()
        if self.keeps_head and old is not None:
            with torch.no_grad():
                self.model.lm_head.weight.copy_(old.lm_head.weight)

    def complete(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.completions += 1
        if self.fails > 0:
            self.fails -= 1
            return 500, {"error": "planted"}
        temperature = body["temperature"]
        sampling = Sampling(body["max_tokens"], temperature, max(body["top_k"], 0), body["top_p"], body["min_p"])
        rollout = TransformersRollout(0, body["stop_token_ids"])
        out = rollout.generate(self.model, RolloutRequest([body["prompt"]], body["n"], sampling, [body["seed"]]))
        choices = []
        for index in range(body["n"]):
            mask = out.completion_mask[index]
            logps = out.sampler_logps[index][mask] * (temperature if self.raw_logps else 1.0)
            choices.append(
                {
                    "index": index,
                    "token_ids": out.completion_ids[index][mask].tolist(),
                    "logprobs": {"token_logprobs": logps.tolist()},
                    "finish_reason": "length" if out.truncated[index] else "stop",
                }
            )
        return 200, {"choices": choices[::-1]}


@pytest.fixture
def fake_vllm() -> Iterator[FakeVllm]:
    server = FakeVllm()
    yield server
    server.stop()


@pytest.fixture
def servers(fake_vllm: Any) -> Iterator[list[Any]]:
    """One with two workers, one with one; both hold the model as it begins."""
    second = type(fake_vllm)()
    fake_vllm.workers = 2
    for server in (fake_vllm, second):
        server.model = tiny()
    yield [fake_vllm, second]
    second.stop()


class NoTokenizer:
    pad_token_id = 0

    def save_pretrained(self, directory: Path) -> None:
        pass


def tiny(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model


def change(model: torch.nn.Module, amount: float = 0.05) -> None:
    """An optimizer step, enlarged."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=amount)


def connect(fake: Any, directory: Path, main: bool = True, **settings: Any) -> VllmRollout:
    config = RolloutConfig(backend="vllm", vllm={"urls": [fake.url], "retries": 1, "start_timeout": 2, **settings})
    return VllmRollout(config, NoTokenizer(), 0, [1], directory, main)  # type: ignore[arg-type]
