"""The vLLM backend against a server of our own that speaks its HTTP, with every fault planted once."""

from __future__ import annotations

import json
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from vdr_cli.config import RolloutConfig
from vdr_cli.errors import ConfigError, MachineError
from vdr_cli.rollout import in_vllm
from vdr_cli.rollout.base import Rollout, RolloutRequest
from vdr_cli.rollout.build import open_rollout
from vdr_cli.rollout.in_vllm.vdr_weights import Receiver, own_address
from vdr_cli.rollout.transformers_backend import TransformersRollout
from vdr_cli.rollout.vllm_backend import JUDGED, VllmRollout
from vdr_cli.rollout.vllm_broadcast import Broadcast
from vdr_cli.rollout.vllm_client import VllmClient
from vdr_cli.rollout.weights import WEIGHTS, checksum, served_weights, write_model
from vdr_cli.samples import Sampling

PROMPTS = [[5, 6, 7, 8], [9], [10, 11]]
KEYS = [2**62 + 11, 22, 33]


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


def test_completions_and_logps_are_the_servers(fake_vllm: Any, tmp_path: Path) -> None:
    model, sampling = tiny(), Sampling(max_new_tokens=9, temperature=1.2, top_k=20)
    out = connect(fake_vllm, tmp_path).generate(model, RolloutRequest(PROMPTS, 4, sampling, KEYS))
    own = TransformersRollout(0, [1]).generate(model, RolloutRequest(PROMPTS, 4, sampling, [key >> 1 for key in KEYS]))
    assert torch.equal(out.completion_ids, own.completion_ids)
    assert torch.equal(out.completion_mask, own.completion_mask)
    assert torch.equal(out.prompt_ids, own.prompt_ids)
    assert torch.equal(out.truncated, own.truncated)
    assert torch.allclose(out.sampler_logps, own.sampler_logps, atol=1e-5)


def test_prompts_are_spread_over_several_servers(fake_vllm: Any, tmp_path: Path) -> None:
    second = type(fake_vllm)()
    try:
        urls = [fake_vllm.url, second.url]
        sampling = Sampling(max_new_tokens=6)
        out = connect(fake_vllm, tmp_path, urls=urls).generate(tiny(), RolloutRequest(PROMPTS, 2, sampling, KEYS))
        own = TransformersRollout(0, [1]).generate(
            tiny(), RolloutRequest(PROMPTS, 2, sampling, [key >> 1 for key in KEYS])
        )
        assert torch.equal(out.completion_ids, own.completion_ids)
        assert fake_vllm.reloads == second.reloads == 1
        assert second.completions > len(PROMPTS)  # its own proof, and a prompt
        second.stale = True
        rollout, model = connect(fake_vllm, tmp_path, urls=urls), tiny()
        change(model)
        with pytest.raises(ConfigError, match=f"log-probabilities of {second.url} differ"):
            rollout.generate(model, RolloutRequest(PROMPTS, 2, sampling, KEYS))
    finally:
        second.stop()


def test_greedy_completions_are_asked_for_once(fake_vllm: Any, tmp_path: Path) -> None:
    sampling = Sampling(max_new_tokens=5, temperature=0)
    out = connect(fake_vllm, tmp_path).generate(tiny(), RolloutRequest(PROMPTS, 3, sampling, KEYS))
    own = TransformersRollout(0, [1]).generate(tiny(), RolloutRequest(PROMPTS, 3, sampling, KEYS))
    assert torch.equal(out.completion_ids, own.completion_ids)


def test_weights_are_pushed_when_they_changed_and_only_then(fake_vllm: Any, tmp_path: Path) -> None:
    model, rollout, sampling = tiny(), connect(fake_vllm, tmp_path), Sampling(max_new_tokens=6)
    rollout.generate(model, RolloutRequest(PROMPTS, 2, sampling, KEYS))
    rollout.generate(model, RolloutRequest(PROMPTS, 2, sampling, KEYS))
    assert fake_vllm.reloads == 1
    change(model)
    out = rollout.generate(model, RolloutRequest(PROMPTS, 2, sampling, KEYS))
    assert fake_vllm.reloads == 2
    own = TransformersRollout(0, [1]).generate(model, RolloutRequest(PROMPTS, 2, sampling, [key >> 1 for key in KEYS]))
    assert torch.equal(out.completion_ids, own.completion_ids)


def test_the_checksum_sees_one_changed_bit_anywhere() -> None:
    model = tiny().to(torch.bfloat16)
    before = checksum(model)
    assert checksum(tiny().to(torch.bfloat16)) == before
    for parameter in model.parameters():
        with torch.no_grad():
            bits = parameter.view(torch.int16).flatten()
            bits[-1] ^= 1
            assert checksum(model) != before
            bits[-1] ^= 1
    assert checksum(model) == before


def plant_stale(fake: Any) -> None:
    fake.stale = True


def plant_old_head(fake: Any) -> None:
    fake.keeps_head = True


@pytest.mark.parametrize("plant", [plant_stale, plant_old_head])
@pytest.mark.parametrize("amount", [0.05, 1e-3])
def test_wrong_weights_after_a_push_stop_the_run(
    plant: Callable[[Any], None], amount: float, fake_vllm: Any, tmp_path: Path
) -> None:
    model, rollout = tiny(tied=plant is plant_old_head), connect(fake_vllm, tmp_path)
    rollout.generate(model, RolloutRequest(PROMPTS, 2, Sampling(6), KEYS))
    plant(fake_vllm)
    change(model, amount)
    with pytest.raises(ConfigError, match="differ from the trainer's by"):
        rollout.generate(model, RolloutRequest(PROMPTS, 2, Sampling(6), KEYS))


def test_raw_logps_are_noticed_at_any_training_temperature(fake_vllm: Any, tmp_path: Path) -> None:
    fake_vllm.raw_logps = True
    with pytest.raises(ConfigError, match="processed_logprobs"):
        connect(fake_vllm, tmp_path).generate(tiny(), RolloutRequest(PROMPTS, 2, Sampling(6, temperature=1.0), KEYS))


def test_a_tied_model_is_served_untied(tmp_path: Path) -> None:
    model = tiny(tied=True)
    write_model(model, NoTokenizer(), tmp_path)  # type: ignore[arg-type]
    served = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert not served.config.tie_word_embeddings
    assert model.config.tie_word_embeddings
    assert served.lm_head.weight.data_ptr() != served.model.embed_tokens.weight.data_ptr()
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(served(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gemma2", "qwen2"])
def test_a_server_reads_the_names_of_a_checkpoint(kind: str, tmp_path: Path) -> None:
    """transformers holds experts as one tensor, under other names; and vLLM has no LM head for Gemma 2."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    experts = {"num_experts": 2, "num_local_experts": 2, "moe_intermediate_size": 8, "num_experts_per_tok": 1}
    config = AutoConfig.for_model(kind, **sizes, **(experts if kind in ("mixtral", "qwen3_moe") else {}))
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "saved")
    write_model(model, NoTokenizer(), tmp_path / "served")  # type: ignore[arg-type]
    saved, served = load_file(tmp_path / "saved" / WEIGHTS), load_file(tmp_path / "served" / WEIGHTS)
    assert served.keys() - {"lm_head.weight"} == saved.keys() - {"lm_head.weight"}
    assert all(torch.equal(served[name], saved[name]) for name in saved)
    assert ("lm_head.weight" in served) == (kind != "gemma2")
    tied = json.loads((tmp_path / "served" / "config.json").read_text())["tie_word_embeddings"]
    assert tied == (kind == "gemma2")


def test_a_server_error_is_retried_with_a_limit(fake_vllm: Any, tmp_path: Path) -> None:
    rollout = connect(fake_vllm, tmp_path)
    rollout.generate(tiny(), RolloutRequest(PROMPTS, 2, Sampling(4), KEYS))
    fake_vllm.fails = 1
    rollout.generate(tiny(), RolloutRequest(PROMPTS, 2, Sampling(4), KEYS))
    fake_vllm.fails = 100
    with pytest.raises(MachineError, match=f"{fake_vllm.url} answered /v1/completions with 500.*planted"):
        rollout.generate(tiny(), RolloutRequest(PROMPTS, 2, Sampling(4), KEYS))


def test_a_server_lost_in_the_middle_is_named(fake_vllm: Any, tmp_path: Path) -> None:
    rollout = connect(fake_vllm, tmp_path)
    rollout.generate(tiny(), RolloutRequest(PROMPTS, 2, Sampling(4), KEYS))
    url = fake_vllm.url
    fake_vllm.stop()
    with pytest.raises(MachineError, match=f"vLLM server {url} does not answer"):
        rollout.generate(tiny(), RolloutRequest(PROMPTS, 2, Sampling(4), KEYS))


@pytest.mark.parametrize("push", ["directory", "broadcast"])
@pytest.mark.parametrize("when", ["sampling", "pushing"])
def test_the_prompts_of_a_lost_server_go_to_the_others(
    when: str, push: str, servers: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = servers
    model, sampling, urls = tiny(), Sampling(6), [first.url, second.url]
    rollout = connect(first, tmp_path, urls=urls, push=push, start_timeout=20, retries=0)
    rollout.generate(model, RolloutRequest(PROMPTS, 2, sampling, KEYS))
    second.stop()
    for step in range(2):
        if when == "pushing" or step:
            change(model)
        told: list[int] = []
        out = rollout.generate(
            model, RolloutRequest(PROMPTS, 2, sampling, KEYS, lambda places, _, told=told: told.extend(places))
        )
        own = TransformersRollout(0, [1]).generate(
            model, RolloutRequest(PROMPTS, 2, sampling, [key >> 1 for key in KEYS])
        )
        assert torch.equal(out.completion_ids, own.completion_ids) and sorted(told) == [0, 1, 2]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vdr: ")]
    assert len(said) == 1 and said[0].startswith(f"vdr: vLLM server {urls[1]} does not answer /")
    assert said[0].endswith("; its prompts go to the other server for the rest of the run")
    first.stop()
    with pytest.raises(MachineError, match=f"vLLM server {urls[0]} does not answer .*is it running"):
        rollout.generate(model, RolloutRequest(PROMPTS, 2, sampling, KEYS))


@pytest.mark.parametrize("push", ["directory", "broadcast"])
def test_a_server_sleeps_between_rollouts_and_wakes_with_the_newest_weights(
    push: str, fake_vllm: Any, tmp_path: Path
) -> None:
    model, sampling = tiny(), Sampling(6)
    fake_vllm.model = tiny()
    rollout = connect(fake_vllm, tmp_path, push=push, start_timeout=20)
    rollout.settings = rollout.settings.model_copy(update={"sleep": True})  # as with a server that vdr started
    for step in range(4):
        out = rollout.generate(model, RolloutRequest(PROMPTS, 2, sampling, KEYS))
        own = TransformersRollout(0, [1]).generate(
            model, RolloutRequest(PROMPTS, 2, sampling, [key >> 1 for key in KEYS])
        )
        assert torch.equal(out.completion_ids, own.completion_ids) and not fake_vllm.asleep
        for _ in range(2):  # once more changes nothing
            rollout.rest()
        assert fake_vllm.asleep == {"weights", "kv_cache"} and fake_vllm.naps == step + 1
        if step % 2:
            change(model)


def test_other_ranks_wait_until_a_server_is_awake(fake_vllm: Any, tmp_path: Path) -> None:
    model, sampling = tiny(), Sampling(6)
    ranks = [connect(fake_vllm, tmp_path, main=main, start_timeout=0.2) for main in (True, False)]
    for rank in ranks:
        rank.settings = rank.settings.model_copy(update={"sleep": True})
        rank.generate(model, RolloutRequest(PROMPTS, 2, sampling, KEYS))
    for rank in ranks:
        rank.rest()
    with pytest.raises(MachineError, match="rank 0 did not report"):
        ranks[1].generate(model, RolloutRequest(PROMPTS, 2, sampling, KEYS))
    assert fake_vllm.naps == 1


def test_servers_sample_while_the_trainer_does_something_else(fake_vllm: Any, tmp_path: Path) -> None:
    model, rollout, sampling = tiny(), connect(fake_vllm, tmp_path), Sampling(max_new_tokens=6)
    whole = rollout.generate(model, RolloutRequest(PROMPTS, 2, sampling, KEYS))
    told: dict[int, Any] = {}
    with fake_vllm.lock:  # nothing is answered meanwhile
        wait = rollout.start(
            model, RolloutRequest(PROMPTS, 2, sampling, KEYS, lambda places, given: told.update({places[0]: given}))
        )
        assert not told
    assert torch.equal(wait().completion_ids, whole.completion_ids)
    assert sorted(told) == [0, 1, 2] and len(told[1]) == 2


def test_a_push_waits_for_what_is_sampled_under_the_old_weights(
    fake_vllm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rollout, sampling = tiny(), connect(fake_vllm, tmp_path), Sampling(max_new_tokens=6)
    whole = rollout.generate(model, RolloutRequest(PROMPTS, 2, sampling, KEYS))
    fake_vllm.lock.acquire()
    wait = rollout.start(model, RolloutRequest(PROMPTS, 2, sampling, KEYS))
    before, done = list(rollout.sampling), []
    reload = VllmClient.reload
    monkeypatch.setattr(VllmClient, "reload", lambda *a: (done.append(all(each.done() for each in before)), reload(*a)))
    change(model)
    threading.Timer(0.3, fake_vllm.lock.release).start()
    rollout.generate(model, RolloutRequest(PROMPTS, 2, sampling, KEYS))
    assert done == [True]
    assert torch.equal(wait().completion_ids, whole.completion_ids)


def test_no_server_at_the_start_is_named(tmp_path: Path) -> None:
    config = RolloutConfig(backend="vllm", vllm={"urls": ["http://127.0.0.1:9"], "start_timeout": 0.1})
    rollout = VllmRollout(config, NoTokenizer(), 0, [1], tmp_path)  # type: ignore[arg-type]
    with pytest.raises(MachineError, match=r"127.0.0.1:9 is not ready"):
        rollout.generate(tiny(), RolloutRequest(PROMPTS, 2, Sampling(4), KEYS))


def test_old_versions_short_contexts_and_closed_servers_are_refused(fake_vllm: Any, tmp_path: Path) -> None:
    fake_vllm.version = "0.9.2"
    with pytest.raises(ConfigError, match=r"runs vLLM 0.9.2; 0.11 or newer"):
        connect(fake_vllm, tmp_path).generate(tiny(), RolloutRequest(PROMPTS, 2, Sampling(4), KEYS))
    fake_vllm.version, fake_vllm.max_model_len = "0.32.1+cpu", 10
    with pytest.raises(ConfigError, match=r"rollout.max_new_tokens: .* take 104 tokens"):
        connect(fake_vllm, tmp_path).generate(tiny(), RolloutRequest(PROMPTS, 2, Sampling(100), KEYS))
    fake_vllm.development = False
    with pytest.raises(ConfigError, match="VLLM_SERVER_DEV_MODE=1"):
        connect(fake_vllm, tmp_path).generate(tiny(), RolloutRequest(PROMPTS, 2, Sampling(4), KEYS))


def test_other_ranks_wait_for_rank_0s_push(fake_vllm: Any, tmp_path: Path) -> None:
    model, sampling = tiny(), Sampling(max_new_tokens=6)
    other = connect(fake_vllm, tmp_path, main=False, start_timeout=0.2)
    with pytest.raises(MachineError, match="rank 0 did not report"):
        other.generate(model, RolloutRequest(PROMPTS, 2, sampling, KEYS))
    first = connect(fake_vllm, tmp_path).generate(model, RolloutRequest(PROMPTS, 2, sampling, KEYS))
    assert torch.equal(
        first.completion_ids, other.generate(model, RolloutRequest(PROMPTS, 2, sampling, KEYS)).completion_ids
    )
    change(model)
    with pytest.raises(MachineError, match="rank 0 did not report"):
        other.generate(model, RolloutRequest(PROMPTS, 2, sampling, KEYS))
    assert fake_vllm.reloads == 1


def test_a_push_that_fails_on_rank_0_ends_the_other_ranks_wait(fake_vllm: Any, tmp_path: Path) -> None:
    model, request = tiny(), RolloutRequest(PROMPTS, 2, Sampling(6), KEYS)
    fake_vllm.raw_logps = True
    with pytest.raises(ConfigError, match="processed_logprobs"):
        connect(fake_vllm, tmp_path).generate(model, request)
    other = connect(fake_vllm, tmp_path, main=False, start_timeout=60.0)
    with pytest.raises(MachineError, match=r"rank 0 could not push the weights: .*processed_logprobs"):
        other.generate(model, request)


def test_a_push_may_differ_more_than_the_first_that_happened_to_differ_little(fake_vllm: Any, tmp_path: Path) -> None:
    """In bfloat16 a few tokens' mean difference varies tenfold with the tokens."""
    rollout = connect(fake_vllm, tmp_path)
    for difference in (0.002, 0.006, 0.017):
        rollout._check_probes(difference, 0)
    with pytest.raises(ConfigError, match=r"at most 0\.0680"):
        rollout._check_probes(0.08, 0)
    for _ in range(JUDGED):
        rollout._check_probes(0.017, 0)
    rollout._check_probes(0.06, 0)
    with pytest.raises(ConfigError, match=r"at most 0\.0680"):  # later ones may be stale weights, and raise no bound
        rollout._check_probes(0.08, 0)


def test_an_eos_as_the_last_allowed_token_ends_a_completion(fake_vllm: Any, tmp_path: Path) -> None:
    """Some servers look at the length first."""
    client = connect(fake_vllm, tmp_path).clients[0]
    choice = {"token_ids": [5, 2], "logprobs": {"token_logprobs": [-1.0, -1.0]}, "finish_reason": "length"}
    assert not client._answer(choice, (2,)).truncated and client._answer(choice, (3,)).truncated


def test_a_rank_without_prompts_still_pushes(fake_vllm: Any, tmp_path: Path) -> None:
    out = connect(fake_vllm, tmp_path).generate(tiny(), RolloutRequest([], 2, Sampling(4), []))
    assert len(out) == 0
    assert fake_vllm.reloads == 1


def test_a_server_that_ends_while_starting_is_explained(tmp_path: Path) -> None:
    config = RolloutConfig(
        backend="vllm", vllm={"python": sys.executable, "urls": ["http://127.0.0.1:9"], "start_timeout": 60}
    )
    with open_rollout(config, NoTokenizer(), [1], tmp_path, main=True) as rollout:
        backend: Rollout = rollout
        with pytest.raises(MachineError, match=r"ended while starting: it ended with code 1; last line of .*vllm"):
            backend.generate(tiny(), RolloutRequest(PROMPTS, 2, Sampling(4), KEYS))


def test_a_wrong_interpreter_is_refused(tmp_path: Path) -> None:
    config = RolloutConfig(backend="vllm", vllm={"python": str(tmp_path / "python")})
    rollout = VllmRollout(config, NoTokenizer(), 0, [1], tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"rollout.vllm.python: .* is not an interpreter"):
        rollout.generate(tiny(), RolloutRequest(PROMPTS, 2, Sampling(4), KEYS))


# ---- weights by broadcast, over gloo, to workers that are threads here ---------------------------------------------


@pytest.fixture
def servers(fake_vllm: Any) -> Iterator[list[Any]]:
    """One with two workers, one with one; both hold the model as it begins."""
    second = type(fake_vllm)()
    fake_vllm.workers = 2
    for server in (fake_vllm, second):
        server.model = tiny()
    yield [fake_vllm, second]
    second.stop()


def clients_of(servers: list[Any]) -> list[VllmClient]:
    return [VllmClient(server.url, push_timeout=20.0) for server in servers]


def test_a_proxy_does_not_stand_before_a_server(fake_vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"{fake_vllm.url}/health")  # the way that a proxy bars
    assert VllmClient(fake_vllm.url, push_timeout=5.0)._call("GET", "/health", None, 5.0) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_worker_of_every_server_has_the_trainers_bits(dtype: torch.dtype, servers: list[Any]) -> None:
    model = tiny(tied=True).to(dtype)
    for server in servers:
        server.model = tiny().to(dtype)
    group = Broadcast(clients_of(servers), on_gpu=False, timeout=20.0)
    assert group.backend == "gloo"
    for _ in range(2):
        change(model)
        group.send(served_weights(model))
        for server in servers:
            held = server.model.state_dict()
            assert torch.equal(held.pop("lm_head.weight"), model.model.embed_tokens.weight)
            assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in held.items())
    assert [server.broadcasts for server in servers] == [4, 2]


def test_a_run_that_pushes_by_broadcast_writes_no_weights_after_the_first(servers: list[Any], tmp_path: Path) -> None:
    model = tiny()
    urls = [server.url for server in servers]
    rollout = connect(servers[0], tmp_path, urls=urls, push="broadcast", start_timeout=20)
    for step in range(3):
        out = rollout.generate(model, RolloutRequest(PROMPTS, 2, Sampling(6), KEYS))
        own = TransformersRollout(0, [1]).generate(
            model, RolloutRequest(PROMPTS, 2, Sampling(6), [key >> 1 for key in KEYS])
        )
        assert torch.equal(out.completion_ids, own.completion_ids)
        if step == 0:
            (tmp_path / WEIGHTS).unlink()
        change(model)
    assert not (tmp_path / WEIGHTS).exists()
    assert servers[0].reloads == servers[1].reloads == 0


@pytest.mark.parametrize("fault", ["stale", "keeps_head"])
def test_wrong_weights_after_a_broadcast_stop_the_run(fault: str, fake_vllm: Any, tmp_path: Path) -> None:
    model, fake_vllm.model = tiny(), tiny()
    rollout = connect(fake_vllm, tmp_path, push="broadcast", start_timeout=20)
    rollout.generate(model, RolloutRequest(PROMPTS, 2, Sampling(6), KEYS))
    setattr(fake_vllm, fault, True)
    change(model)
    with pytest.raises(ConfigError, match="differ from the trainer's by"):
        rollout.generate(model, RolloutRequest(PROMPTS, 2, Sampling(6), KEYS))


def test_a_server_that_fails_in_the_middle_is_named_at_once(servers: list[Any]) -> None:
    group = Broadcast(clients_of(servers), on_gpu=False, timeout=6.0)
    servers[1].breaks = True
    with pytest.raises(
        MachineError, match=f"{servers[1].url} answered /collective_rpc with 500: .*planted in the middle"
    ):
        group.send(served_weights(tiny()))  # and not that the time is over


def test_a_server_without_the_extension_or_with_copies_is_refused(fake_vllm: Any) -> None:
    fake_vllm.copies = 2
    with pytest.raises(ConfigError, match=f"{fake_vllm.url} holds several copies of the model"):
        Broadcast(clients_of([fake_vllm]), on_gpu=False, timeout=5.0)
    fake_vllm.receives = False
    with pytest.raises(ConfigError, match=r"cannot take it .*--worker-extension-cls vdr_weights.Receiver"):
        Broadcast(clients_of([fake_vllm]), on_gpu=False, timeout=5.0)
    fake_vllm.development = False
    with pytest.raises(ConfigError, match="VLLM_SERVER_DEV_MODE=1"):
        Broadcast(clients_of([fake_vllm]), on_gpu=False, timeout=5.0)


def test_another_release_of_torch_is_refused(fake_vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Receiver.vdr_place
    monkeypatch.setattr(Receiver, "vdr_place", lambda self: place(self) | {"torch": "1.2.3+cpu"})
    with pytest.raises(ConfigError, match=f"{fake_vllm.url} has torch 1.2.3 and vdr torch .*push=directory"):
        Broadcast(clients_of([fake_vllm]), on_gpu=False, timeout=5.0)


def test_workers_that_do_not_come_are_not_waited_for_without_end(
    fake_vllm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Receiver, "vdr_join", lambda self, **_: None)
    with pytest.raises(MachineError, match=f"{fake_vllm.url} over gloo: "):
        Broadcast(clients_of([fake_vllm]), on_gpu=False, timeout=1.0)


def test_it_stays_on_loopback_where_the_servers_are() -> None:
    assert own_address("127.0.0.1") == "127.0.0.1"
    assert own_address("localhost") in ("127.0.0.1", "::1")


def test_nothing_else_lies_where_vllm_imports_from() -> None:
    """That directory is the PYTHONPATH of vLLM's processes: a module in it would hide theirs of the same name."""
    assert in_vllm.__file__ is not None
    files = {file.name for file in Path(in_vllm.__file__).parent.iterdir()} - {"__pycache__"}
    assert files == {"__init__.py", "vdr_weights.py"}
