"""The run's model as plain transformers, in float64: one forward over whole, unpadded sequences, no cache."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vdr_cli.beds.registry import BEDS
from vdr_cli.config import ModelConfig
from vdr_cli.errors import ConfigError

Array = NDArray[np.float64]
Ids = Sequence[int]

ADAPTER = "adapter_config.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORWARD_TOKENS = 2**15
"""Tokens of one forward, all rows together."""


def adapter_of(name: str) -> Path | None:
    """The directory of the saved adapter that a model's name is; None: it is no adapter."""
    path = Path(name).expanduser()
    return path if (path / ADAPTER).is_file() and not (path / "config.json").is_file() else None


def place_of(name: str) -> str:
    """The place of a model's files: a bed's directory, a directory, a run's model/, an adapter's base, else the hub id
    itself."""
    if name in BEDS:
        return str(BEDS[name].model_path)
    if (adapter := adapter_of(name)) is not None:
        return place_of(json.loads((adapter / ADAPTER).read_text())["base_model_name_or_path"])
    for candidate in (Path(name).expanduser(), Path(name).expanduser() / "model"):
        if (candidate / "config.json").is_file():
            return str(candidate)
    return name


def load_start(cfg: ModelConfig, dtype: str, seed: int) -> Any:
    """The model that the run started from, its weights rounded to `dtype` and held in float64; adapters included."""
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    arguments = {"revision": cfg.revision, "trust_remote_code": cfg.trust_remote_code}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            place_of(cfg.name), dtype=DTYPES[dtype], attn_implementation="eager", **arguments
        )
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(f"model {cfg.name}: cannot be loaded ({reason}); the audit needs the start model") from error
    if (adapter := adapter_of(cfg.name)) is not None:
        model = _peft().PeftModel.from_pretrained(model, adapter).merge_and_unload()
    if cfg.lora is not None:
        model = _with_adapters(model, cfg, seed)
    return model.double().eval()


def _with_adapters(model: nn.Module, cfg: ModelConfig, seed: int) -> Any:
    """PEFT's adapters, A drawn under the run's seed and B 0."""
    peft = _peft()
    assert cfg.lora is not None
    settings: dict[str, Any] = {"r": cfg.lora.rank, "lora_alpha": cfg.lora.alpha, "target_modules": cfg.lora.targets}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        lora = peft.LoraConfig(**settings, lora_dropout=0.0, task_type="CAUSAL_LM")
        return peft.get_peft_model(model, lora, autocast_adapter_dtype=False)  # type: ignore[arg-type]


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError("the model has an adapter: the audit needs PEFT (extra lora)") from error
    return peft


def load_tokenizer(cfg: ModelConfig) -> Any:
    """The model's tokenizer; an adapter may bring its own."""
    from transformers import AutoTokenizer

    adapter = adapter_of(cfg.name)
    own = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    return AutoTokenizer.from_pretrained(
        str(adapter) if own else place_of(cfg.name), revision=cfg.revision, trust_remote_code=cfg.trust_remote_code
    )


def end_ids(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end a completion: those of the generation config and the tokenizer's."""
    found: set[int] = set()
    for value in (getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id):
        found |= set(value) if isinstance(value, list) else set() if value is None else {value}
    return found


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that the run trains, by name; tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def put(model: nn.Module, weights: dict[str, Tensor], dtype: str) -> None:
    """Give the model these weights, rounded to what the run computed with."""
    for name, parameter in trained(model).items():
        parameter.copy_(weights[name].to(DTYPES[dtype]) if dtype != "float32" else weights[name])


def alike(
    prompts: Sequence[Ids], completions: Sequence[Ids], chosen: Sequence[int] | None = None
) -> Iterator[list[int]]:
    """Rows in sets that need no padding: prompts as long, completions as long, and few enough for one forward.

    chosen: the rows to take; None: all.
    """
    sizes: dict[tuple[int, int], list[int]] = {}
    for row in range(len(prompts)) if chosen is None else chosen:
        if len(completions[row]):
            sizes.setdefault((len(prompts[row]), len(completions[row])), []).append(row)
    for (P, T), rows in sizes.items():
        most = max(FORWARD_TOKENS // (P + T), 1)
        for start in range(0, len(rows), most):
            yield rows[start : start + most]


def logits_of(model: nn.Module, prompts: Sequence[Ids], completions: Sequence[Ids], rows: Sequence[int]) -> Tensor:
    """(n, T, V) float64: the logits that predict each token of these completions, rows of one shape."""
    ids = torch.tensor([[*prompts[row], *completions[row]] for row in rows])
    P = len(prompts[rows[0]])
    output = model(input_ids=ids, use_cache=False)
    return output.logits[:, P - 1 : -1].double()  # type: ignore[no-any-return]


def picked(log_p: Tensor, completions: Sequence[Ids], rows: Sequence[int]) -> Tensor:
    """(n, T): the entries of log_p (n, T, V) at the completions' own tokens."""
    targets = torch.tensor([list(completions[row]) for row in rows])
    return log_p.gather(-1, targets[..., None]).squeeze(-1)


def logps_and_entropies(
    model: nn.Module, prompts: Sequence[Ids], completions: Sequence[Ids], rows: Sequence[int], temperature: float
) -> tuple[Tensor, Tensor]:
    """log π(y_t) and H_t at the sampling temperature, (n, T) each, with gradient where the caller allows it."""
    log_p = torch.log_softmax(logits_of(model, prompts, completions, rows) / temperature, dim=-1)
    return picked(log_p, completions, rows), -(log_p.exp() * log_p).sum(-1)


@torch.no_grad()
def token_numbers(
    model: nn.Module, prompts: Sequence[Ids], completions: Sequence[Ids], temperature: float
) -> tuple[Array, Array]:
    """(B, T) log-probabilities and entropies of all completions, 0 at padding."""
    widest = max(max((len(ids) for ids in completions), default=0), 1)
    logps, entropy = np.zeros((len(prompts), widest)), np.zeros((len(prompts), widest))
    for rows in alike(prompts, completions):
        first, second = logps_and_entropies(model, prompts, completions, rows, temperature)
        logps[rows, : first.shape[1]], entropy[rows, : first.shape[1]] = first.numpy(), second.numpy()
    return logps, entropy
