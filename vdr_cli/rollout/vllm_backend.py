"""Sampling on vLLM servers: changed weights are pushed, and checked before use."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from vdr_cli.config import RolloutConfig
from vdr_cli.errors import ConfigError, MachineError
from vdr_cli.models.policy import completion_logps
from vdr_cli.rollout.base import LayeredWeights, Rollout, RolloutRequest
from vdr_cli.rollout.vllm_broadcast import Broadcast
from vdr_cli.rollout.vllm_client import SUSPICION, Answer, VllmClient, assemble
from vdr_cli.rollout.vllm_dialogue import Served
from vdr_cli.rollout.vllm_server import VllmServer
from vdr_cli.rollout.weights import checksum, in_layer_order, served_weights, write_model, write_weights
from vdr_cli.samples import Completions, Sampling
from vdr_cli.system.files import write_whole

PROBE = Sampling(max_new_tokens=32, temperature=0.5)
"""Drawn to compare log-probabilities; not at temperature 1, so that a server that returns them unscaled is seen."""

PROBES = 8
"""Prompts drawn from for it, on each server."""

PUSHED = "pushed.json"
"""Rank 0's word to the other ranks, in the directory of the weights: which ones the servers hold."""

MOST_REQUESTS = 256
"""Requests in flight at once; the server queues those that it cannot decode together."""

NOISE = 4.0
"""A push must agree to within this many times the largest difference of the first JUDGED."""

JUDGED = 8
"""Comparisons that say how much a server's numbers differ; later ones do not, or stale weights could creep."""

FLOOR = 2e-5
"""Nats; differences below it are rounding and never counted as stale weights."""


class VllmRollout(Rollout):
    """The Rollout protocol on one or several servers; sampler_logps are those the servers sampled with.

    Completion g of a prompt is drawn by the server's generator, seeded by the prompt's key and g; in a conversation its
    later turns by these and the turn's number. Rank 0 hands the weights over; the other ranks wait until the servers
    hold the same ones as they do.
    """

    def __init__(
        self,
        config: RolloutConfig,
        tokenizer: PreTrainedTokenizerBase,
        pad_id: int,
        eos_ids: Sequence[int],
        directory: Path,
        main: bool = True,
        layered: LayeredWeights | None = None,
    ) -> None:
        """directory: where weights are handed over. main: this rank starts the server, pushes, and says what was lost.

        layered: the weights, where no full copy of them exists; what `generate` and `begin` get is then a model whose
        decoder layers are empty, and both are collectives when weights have changed.
        """
        self.config, self.settings = config, config.vllm
        if self.settings.python and len(self.settings.urls) > 1:
            raise ConfigError("rollout.vllm.urls: with rollout.vllm.python give the one address of vdr's own server")
        self.tokenizer, self.pad_id, self.eos_ids = tokenizer, pad_id, tuple(eos_ids)
        self.directory, self.main, self.layered = directory.resolve(), main, layered
        if main:
            (self.directory / PUSHED).unlink(missing_ok=True)  # of another process
        self.clients = [
            VllmClient(
                url, self.settings.request_timeout, self.settings.start_timeout, self.settings.retries, self._ended
            )
            for url in self.settings.urls
        ]
        self.serving = list(range(len(self.clients)))
        """Numbers of the servers that have not been lost."""
        self._losing = Lock()
        self.server: VllmServer | None = None
        self.names: list[str] = []
        """The served model's name, by server."""
        self.pushed: int | None = None
        self.pushes = 0
        self.asleep = False
        self.broadcast: Broadcast | None = None
        self.noise: list[float] = []
        """Nats per token by which the first JUDGED comparisons differed."""
        self.sampling: Sequence[Future[list[Answer]]] = []
        """The newest requests to the servers."""

    def start(self, model: nn.Module, request: RolloutRequest) -> Callable[[], Completions]:
        prompts, n = request.prompts, request.n
        self.refresh(model, prompts, request.sampling)

        def tell(index: int, answers: list[Answer]) -> None:
            if request.finished is not None:
                request.finished([index], assemble([prompts[index]], n, answers, self.pad_id))

        def group(index: int) -> list[Answer]:
            answers = self._complete_somewhere(index, prompts[index], n, request.sampling, request.keys[index])
            tell(index, answers)
            return answers

        at_once = len(prompts) if request.conversation is None else len(prompts) * n + 1  # and one that asks for them
        pool = ThreadPoolExecutor(max_workers=min(max(at_once, 1), MOST_REQUESTS))
        if request.conversation is None:
            requests = [pool.submit(group, index) for index in range(len(prompts))]
        else:
            requests = [pool.submit(Served(request, self._complete_somewhere, pool, tell).run)]
        self.sampling = requests

        def whole() -> Completions:
            try:
                answers = [answer for future in requests for answer in future.result()]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
            return assemble(prompts, n, answers, self.pad_id)

        return whole

    def rest(self) -> None:
        if not self.settings.sleep or self.pushed is None or self.asleep:
            return
        if self.main:
            self._on_each(VllmClient.sleep)
        self.asleep = True

    def close(self) -> None:
        """Stop the server that was started here."""
        if self.server is not None:
            self.server.stop()

    def _complete_somewhere(
        self, index: int, prompt: Sequence[int], n: int, sampling: Sampling, key: int
    ) -> list[Answer]:
        """The completions from one server; when that one is lost, once more from another."""
        serving = self.serving
        server = serving[index % len(serving)]
        try:
            return self._complete(server, prompt, n, sampling, key)
        except MachineError as error:
            self._lose(server, error)
        serving = self.serving
        return self._complete(serving[index % len(serving)], prompt, n, sampling, key)

    def _complete(self, server: int, prompt: Sequence[int], n: int, sampling: Sampling, key: int) -> list[Answer]:
        return self.clients[server].complete(self.names[server], prompt, n, sampling, key >> 1, self.eos_ids)

    def _lose(self, server: int, error: MachineError) -> None:
        """Go on without this server, and say so once. Raises the error when there is no other."""
        with self._losing:
            if server not in self.serving:
                return
            if len(self.serving) == 1:
                raise error
            self.serving = [number for number in self.serving if number != server]
            self.broadcast = None  # its process group has the lost workers in it
            others = "other servers" if len(self.serving) > 1 else "other server"
            if self.main:
                lost = str(error).removesuffix(SUSPICION)
                line = f"vdr: {lost}; its prompts go to the {others} for the rest of the run"
                print(line, file=sys.stderr, flush=True)

    def _on_each(self, call: Callable[[VllmClient], object]) -> None:
        """A call to every server in turn; those that do not answer are lost."""
        for server in list(self.serving):
            try:
                call(self.clients[server])
            except MachineError as error:
                self._lose(server, error)

    def _ended(self) -> str:
        return self.server.ended() if self.server is not None else ""

    # ---- weights ---------------------------------------------------------------------------------------------------

    def refresh(self, model: nn.Module, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        """Bring the servers to the model's weights, unless they hold them."""
        if self.layered is not None:
            self._push_layers(model, self.layered, prompts, sampling)
            return
        version = checksum(model)
        if version == self.pushed and not self.asleep:
            return
        wait(self.sampling)  # what is being sampled is sampled under one set of weights
        if self.main:
            with self._failure_announced():
                self._hand_over(model)
                self._find_names(prompts, sampling)
                for server in self.serving:
                    sampled = self._sample_probes(prompts, server)
                    self._check_probes(mean_difference(model, sampled, PROBE.temperature), server)
            self._announce(version)
        else:
            self._await(version)
            self._find_names(prompts, sampling)
        self.pushes += 1
        self.pushed, self.asleep = version, False

    def _push_layers(
        self, model: nn.Module, layered: LayeredWeights, prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> None:
        """`refresh` where no full copy of the weights exists. Collective."""
        version = layered.version
        if version == self.pushed and not self.asleep:
            return
        wait(self.sampling)
        if self.pushed is None or not self.by_broadcast:
            with layered.on_host(self.main) as whole, layered.agreed():
                if self.main:
                    self._write(whole)
        is_fresh = self.settings.python is not None and self.pushed is None
        with layered.agreed():
            if self.main:
                self._bring_up(model.get_input_embeddings().weight, is_fresh)  # type: ignore[operator,union-attr]
        if self.by_broadcast and not is_fresh:
            self._broadcast_layers(model, layered)
        with layered.agreed():
            self._wake("kv_cache")
            self._find_names(prompts, sampling)
        for server in range(len(self.clients)):  # all, on every rank: rank 0 alone may know of a lost one
            with layered.agreed():
                asks = self.main and server in self.serving
                sampled = self._sample_probes(prompts, server) if asks else assemble([], 1, [], self.pad_id)
            logps = layered.read_logps(model, sampled, PROBE.temperature)
            with layered.agreed():
                if asks:
                    self._check_probes(_mean_gap(sampled, logps), server)
        self.pushed, self.asleep = version, False

    @property
    def by_broadcast(self) -> bool:
        return self.settings.push == "broadcast"

    def _hand_over(self, model: nn.Module) -> None:
        is_fresh = self.settings.python is not None and self.server is None
        if self.pushed is None or not self.by_broadcast:
            self._write(model)
        self._bring_up(next(model.parameters()), is_fresh)
        if self.by_broadcast and not is_fresh:
            weights = served_weights(model)
            self._open_broadcast(next(model.parameters()).device).send(weights)
            self._forget_cached_prompts()
        self._wake("kv_cache")

    def _wake(self, what: Literal["weights", "kv_cache"]) -> None:
        """Give the servers that sleep the memory for their weights before a push, for their cache after it."""
        if self.asleep and self.main:
            self._on_each(lambda client: client.wake(what))

    def _write(self, model: nn.Module) -> None:
        """Write the weights where the servers read them; the first time everything that makes a model directory."""
        try:
            if self.pushed is None:
                write_model(model, self.tokenizer, self.directory)
            else:
                write_weights(model, self.directory)
        except (OSError, SafetensorError) as fault:
            raise MachineError(f"rollout.vllm.directory {self.directory}: cannot be written ({fault})") from None

    def _bring_up(self, weight: Tensor, is_fresh: bool) -> None:
        """Start vdr's own server, or wait for servers that run; those reload the directory unless a broadcast follows.

        weight: one of the trainer's, for type and device.
        """
        by_broadcast = self.by_broadcast
        if is_fresh:
            dtype, on_cpu = str(weight.dtype).removeprefix("torch."), weight.device.type == "cpu"
            assert self.settings.python is not None
            self.server = VllmServer(
                self.settings.python,
                self.settings.urls[0],
                self.directory,
                dtype,
                self.settings.arguments,
                on_cpu,
                by_broadcast,
                self.settings.sleep,
            )
        if self.pushed is None:  # servers that were never there are an error, not a loss
            patience = self.settings.start_timeout if is_fresh else min(10.0, self.settings.start_timeout)
            for client in self.clients:
                client.wait_until_ready(patience)
        self._wake("weights")
        if not is_fresh:
            self._on_each(VllmClient.is_there if by_broadcast else self._reload)

    def _reload(self, client: VllmClient) -> None:
        client.reload(self.directory)

    def _open_broadcast(self, device: torch.device) -> Broadcast:
        if self.broadcast is None:
            chosen = [self.clients[server] for server in self.serving]
            self.broadcast = Broadcast(chosen, device.type == "cuda", self.settings.start_timeout)
        return self.broadcast

    def _broadcast_layers(self, model: nn.Module, layered: LayeredWeights) -> None:
        """Send each layer's tensors while they are whole, then the others. Collective.

        After an error on rank 0 it still takes part in the gathers that the other ranks wait for.
        """
        weights = served_weights(model)
        device = model.get_input_embeddings().weight.device  # type: ignore[operator,union-attr]
        error: Exception | None = None
        with ExitStack() as stack, layered.agreed():
            send = None
            try:
                if self.main:
                    send = stack.enter_context(self._open_broadcast(device).sending(in_layer_order(model, weights)))
            except Exception as raised:
                error = raised
            for tensors in layered.layers(model):
                try:
                    if send is not None and error is None:
                        send(tensors)
                except Exception as raised:
                    error = raised
            if error is not None:
                raise error
            if send is not None:
                send({name: tensor for name, tensor in weights.items() if not tensor.is_meta})
                stack.close()
                self._forget_cached_prompts()

    def _forget_cached_prompts(self) -> None:
        self._on_each(VllmClient.forget)

    def _find_names(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        if not self.names:
            longest = max((len(prompt) for prompt in prompts), default=1) + sampling.max_new_tokens
            self.names = [client.check(longest) for client in self.clients]

    def _announce(self, version: int) -> None:
        write_whole(self.directory / PUSHED, json.dumps({"version": version, "push": self.pushes + 1}))

    @contextmanager
    def _failure_announced(self) -> Iterator[None]:
        """The other ranks stop waiting for a push that fails in the block."""
        try:
            yield
        except Exception as error:
            with suppress(OSError):
                write_whole(
                    self.directory / PUSHED,
                    json.dumps({"failed": " ".join(str(error).split()), "push": self.pushes + 1}),
                )
            raise

    def _await(self, version: int) -> None:
        """Wait until rank 0 reports that the servers hold these weights."""
        file, deadline = self.directory / PUSHED, time.monotonic() + self.settings.start_timeout
        wanted = {"version": version, "push": self.pushes + 1}
        while (said := json.loads(file.read_text()) if file.is_file() else {}) != wanted:
            if "failed" in said and said["push"] == wanted["push"]:
                raise MachineError(f"rollout.vllm: rank 0 could not push the weights: {said['failed']}")
            if time.monotonic() > deadline:
                raise MachineError(
                    f"rollout.vllm.directory {self.directory}: rank 0 did not report these weights pushed within "
                    f"{self.settings.start_timeout:.0f} s; do all hosts see the directory?"
                )
            time.sleep(0.05)

    def _sample_probes(self, prompts: Sequence[Sequence[int]], server: int) -> Completions:
        """A few completions from this server, for `_check_probes`."""
        chosen = [list(prompt) for prompt in prompts[:PROBES]] or [[self.eos_ids[0] if self.eos_ids else self.pad_id]]
        with ThreadPoolExecutor(max_workers=len(chosen)) as pool:
            jobs = [pool.submit(self._complete, server, prompt, 1, PROBE, 0) for prompt in chosen]
            answers = [answer for job in jobs for answer in job.result()]
        return assemble(chosen, 1, answers, self.pad_id)

    def _check_probes(self, difference: float, server: int) -> None:
        """Raise ConfigError when this difference, in nats per token, shows that the server holds other weights."""
        allowed = self.settings.tolerance
        if self.noise:
            allowed = min(allowed, max(NOISE * max(self.noise), FLOOR))
        if not difference <= allowed:
            raise ConfigError(
                f"rollout.vllm: log-probabilities of {self.settings.urls[server]} differ from the trainer's by "
                f"{difference:.4f} nats per token after a push (at most {allowed:.4f}): it serves other weights "
                "(stale, or an LM head tied to the embedding that a reload passes over), or was started without "
                f"--logprobs-mode processed_logprobs. Start it on the untied model in {self.directory}"
            )
        if len(self.noise) < JUDGED:
            self.noise.append(difference)


def mean_difference(model: nn.Module, sampled: Completions, temperature: float) -> float:
    """Mean |sampler - trainer| log-probability over the tokens of the completions."""
    device = next(model.parameters()).device
    prompts = sampled.prompt_ids.to(device), sampled.prompt_mask.to(device)
    answers = sampled.completion_ids.to(device), sampled.completion_mask.to(device)
    with torch.no_grad():
        logps, _ = completion_logps(model, *prompts, *answers, temperature)
    return _mean_gap(sampled, logps.cpu())


def _mean_gap(sampled: Completions, logps: Tensor) -> float:
    """Mean |sampler - trainer| log-probability over valid tokens; logps (B, T): the trainer's."""
    return float((logps - sampled.sampler_logps).abs()[sampled.completion_mask].mean())
