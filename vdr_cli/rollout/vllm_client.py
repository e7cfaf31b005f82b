"""One vLLM server over HTTP: token ids in, token ids and log-probabilities out, new weights by directory."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vdr_cli.errors import ConfigError, MachineError
from vdr_cli.samples import Completions, Sampling, pad_prompts

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Passes http_proxy by: a proxy to the outside cannot reach servers on this machine or cluster."""

OLDEST = (0, 11)
"""First version whose completions return token ids; older ones cannot be used."""

SUSPICION = "; is it running?"
"""End of the message about a server of which nothing else is known."""

LOST = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


@dataclass(frozen=True)
class Answer:
    """One completion as the server drew it."""

    token_ids: list[int]
    logps: list[float]
    truncated: bool
    policy: list[bool] | None = None
    """True for tokens that were sampled; None: all of them."""


@dataclass(frozen=True)
class VllmClient:
    """Requests to one server. Every failure names it."""

    url: str
    request_timeout: float = 600.0
    push_timeout: float = 600.0
    retries: int = 3
    lost: Callable[[], str] = lambda: ""
    """Returns why the server ended, or "". Called when it does not answer."""

    def wait_until_ready(self, timeout: float) -> None:
        """Return when the server answers /health; MachineError when it ended or the time is over."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                self._call("GET", "/health", None, timeout=5.0)
                return
            except LOST:
                if self.lost():
                    raise self._error("ended while starting") from None
                if time.monotonic() > deadline:
                    raise self._error(f"is not ready after {timeout:.0f} s") from None
            time.sleep(0.5)

    def check(self, longest: int) -> str:
        """Version, development mode and context length; returns the model's name.

        longest: most tokens of a prompt and its completion.
        """
        version = str(self.get("/version").get("version", "0"))
        if _numbers(version) < OLDEST:
            wanted = ".".join(map(str, OLDEST))
            raise ConfigError(f"rollout.vllm.urls: {self.url} runs vLLM {version}; {wanted} or newer is needed")
        models = self.get("/v1/models").get("data") or [{}]
        room = models[0].get("max_model_len")
        if room is not None and room < longest:
            raise ConfigError(
                f"rollout.max_new_tokens: the longest prompt and completion take {longest} tokens, but {self.url} "
                f"was started for {room}; start it with --max-model-len {longest}"
            )
        return str(models[0].get("id", ""))

    def complete(
        self, model: str, prompt: Sequence[int], n: int, sampling: Sampling, seed: int, eos_ids: Sequence[int] = ()
    ) -> list[Answer]:
        """n completions of one prompt. At temperature 0 they are the same one, which is asked for once."""
        body = {
            "model": model,
            "prompt": list(prompt),
            "n": n if sampling.temperature > 0 else 1,
            "seed": seed,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k or -1,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "stop": list(sampling.stop),
            "stop_token_ids": list(eos_ids),
            "include_stop_str_in_output": True,
            "add_special_tokens": False,
            "skip_special_tokens": False,
            "return_token_ids": True,
            "logprobs": 0,
        }
        choices = sorted(self.post("/v1/completions", body, self.request_timeout)["choices"], key=lambda c: c["index"])
        answers = [self._answer(choice, eos_ids) for choice in choices]
        return answers * n if sampling.temperature == 0 else answers

    def _answer(self, choice: dict[str, Any], eos_ids: Sequence[int]) -> Answer:
        ids, logprobs = choice.get("token_ids"), choice.get("logprobs")
        if ids is None or logprobs is None:
            raise MachineError(f"vLLM server {self.url} returned no token ids or log-probabilities; update vLLM")
        # Some servers look at the length first: an EOS as the last allowed token ends a completion all the same.
        is_cut = choice["finish_reason"] == "length" and not (ids and ids[-1] in eos_ids)
        return Answer(ids, logprobs["token_logprobs"], is_cut)

    def reload(self, directory: Path) -> None:
        """Take the weights in `directory` and forget what was cached under the old ones."""
        try:
            self.call_workers("reload_weights", {"weights_path": str(directory)})
        except ConfigError as error:
            raise ConfigError(
                f"rollout.vllm.urls: {self.url} does not accept weights ({error}); start it with VLLM_SERVER_DEV_MODE=1"
            ) from None
        self.forget()

    def call_workers(self, method: str, arguments: dict[str, Any]) -> list[Any]:
        """A method of every worker of the server; what each returned."""
        answer = self.post("/collective_rpc", {"method": method, "kwargs": arguments}, self.push_timeout)
        return list(answer.get("results") or [])

    def forget(self) -> None:
        """Clear the prefix cache, which was computed with the previous weights."""
        self.post("/reset_prefix_cache", {}, self.push_timeout)

    def sleep(self) -> None:
        """Drop weights and cache, and free their memory. No request may be under way."""
        self.post("/sleep?level=2", {}, self.push_timeout)

    def wake(self, what: Literal["weights", "kv_cache"]) -> None:
        """Take the memory of one of them again. Weights are undefined until the next push."""
        self.post(f"/wake_up?tags={what}", {}, self.push_timeout)

    def is_there(self) -> None:
        """Return if the server answers. Raises MachineError."""
        self.get("/health")

    def get(self, path: str) -> dict[str, Any]:
        return self._patiently("GET", path, None, 30.0)

    def post(self, path: str, body: dict[str, Any], timeout: float) -> dict[str, Any]:
        return self._patiently("POST", path, body, timeout)

    def _patiently(self, method: str, path: str, body: dict[str, Any] | None, timeout: float) -> dict[str, Any]:
        """Repeat a request that got no answer or a server error; a request that was refused is not repeated."""
        for attempt in range(self.retries + 1):
            try:
                return self._call(method, path, body, timeout)
            except urllib.error.HTTPError as error:
                detail = error.read(2000).decode(errors="replace").replace("\n", " ")
                reason = f"answered {path} with {error.code}: {detail[:300]}"
                if error.code < 500:
                    raise ConfigError(f"vLLM server {self.url} {reason}") from None
            except LOST as error:
                reason = f"does not answer {path} ({getattr(error, 'reason', None) or error or type(error).__name__})"
                if self.lost():
                    break
            if attempt < self.retries:
                time.sleep(min(0.5 * 2**attempt, 10.0))
        raise self._error(reason)

    def _call(self, method: str, path: str, body: dict[str, Any] | None, timeout: float) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} if data else {}
        request = urllib.request.Request(self.url.rstrip("/") + path, data, headers, method=method)
        with DIRECT.open(request, timeout=timeout) as response:
            text = response.read()
        return json.loads(text) if text.strip().startswith(b"{") else {}

    def _error(self, what: str) -> MachineError:
        known = self.lost()
        return MachineError(f"vLLM server {self.url} {what}" + (f": {known}" if known else SUSPICION))


def assemble(prompts: Sequence[Sequence[int]], n: int, answers: Sequence[Answer], pad_id: int) -> Completions:
    """Answers, n a prompt in order, to a batch."""
    ids, mask = pad_prompts(prompts, pad_id)
    width = max((len(answer.token_ids) for answer in answers), default=1)
    tokens = torch.full((len(answers), width), pad_id, dtype=torch.int64)
    valid = torch.zeros((len(answers), width), dtype=torch.bool)
    logps: Tensor = torch.zeros((len(answers), width))
    takes_turns = any(answer.policy is not None for answer in answers)
    sampled = torch.zeros_like(valid) if takes_turns else valid
    for row, answer in enumerate(answers):
        count = len(answer.token_ids)
        tokens[row, :count] = torch.tensor(answer.token_ids, dtype=torch.int64)
        logps[row, :count] = torch.tensor(answer.logps)
        valid[row, :count] = True
        if answer.policy is not None:
            sampled[row, :count] = torch.tensor(answer.policy, dtype=torch.bool)
    truncated = torch.tensor([answer.truncated for answer in answers], dtype=torch.bool)
    prompt_ids, prompt_mask = ids.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
    return Completions(prompt_ids, prompt_mask, tokens, valid, logps, truncated, sampled)


def _numbers(version: str) -> tuple[int, ...]:
    parts = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        parts.append(int(part))
    return tuple(parts)
