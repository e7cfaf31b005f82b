"""Names to weights and tokenizers: a bed, a run directory, a local path or a hub id."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from vdr_cli.config import ModelConfig
from vdr_cli.errors import ConfigError, MachineError
from vdr_cli.models.adapters import Gather, add_adapter
from vdr_cli.models.cpu_linear import with_cpu_linears
from vdr_cli.models.hub import settle_on_cache_if_away
from vdr_cli.models.paths import adapter_directory, resolve_model_path
from vdr_cli.models.sizes import language_part, largest
from vdr_cli.models.tied_head import untied_if_files_are

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_dtype(dtype: str) -> torch.dtype:
    """The compute dtype of `model.dtype`: bfloat16 where an accelerator has it, float32 on CPU."""
    if dtype != "auto":
        return DTYPES[dtype]
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return torch.float32


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer, left-padding, with a pad token.

    EOS stands in where it has none, or one that was added without resizing the model's embeddings.
    """
    from transformers import AutoTokenizer

    path = resolve_model_path(name)
    adapter = adapter_directory(name)
    if adapter is not None and (adapter / "tokenizer_config.json").is_file():
        path = str(adapter)
    tokenizer = _load(AutoTokenizer, name, path, revision=revision, trust_remote_code=trust_remote_code)
    if tokenizer.vocab_size < 2:  # transformers makes one without words where files are missing
        raise ConfigError(f"model {name}: its files include no tokenizer; save one with the weights")
    entries = largest(language_part(load_model_config(name, revision, trust_remote_code)), "vocab_size")
    if not _is_entry(tokenizer.pad_token_id, entries):
        if not _is_entry(tokenizer.eos_token_id, entries):
            raise ConfigError(
                f"model {name}: its tokenizer has neither a pad nor an EOS token in the model's vocabulary; set one "
                "in the tokenizer"
            )
        tokenizer.pad_token = tokenizer.eos_token
    _check_decodes(tokenizer, name, entries)
    tokenizer.padding_side = "left"
    return tokenizer


def _check_decodes(tokenizer: Any, name: str, entries: int | None) -> None:
    """A model may sample every entry. Tokenizers in Python can fail on those that they have no token for."""
    has = len(tokenizer)
    for token in (has, entries - 1) if entries is not None and has < entries else ():
        try:
            tokenizer.decode([token])
        except Exception as error:  # a tokenizer in Python may raise anything
            raise ConfigError(
                f"model {name}: its tokenizer ({type(tokenizer).__name__}, {has} tokens) cannot decode token "
                f"{token}, which the model can sample ({type(error).__name__}); add tokens to it until it has "
                f"{entries}, or resize the model's embeddings"
            ) from error


def _is_entry(token: int | None, entries: int | None) -> bool:
    """True for a token of a vocabulary with so many entries; None: their number is not known."""
    return token is not None and (entries is None or token < entries)


def load_model_config(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model's transformers configuration; no weights."""
    from transformers import AutoConfig

    path = resolve_model_path(name)
    return _load(AutoConfig, name, path, revision=revision, trust_remote_code=trust_remote_code)


def load_causal_lm(
    name: str,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: torch.device | str = "cpu",
) -> Any:
    """A plain causal LM in eval mode, no ZeRO; for eval, score and tests."""
    return _load_weights(name, dtype, revision, trust_remote_code).to(device).eval()


def load_for_training(config: ModelConfig, dtype: torch.dtype, gather: Gather | None = None) -> Any:
    """The policy's causal LM. Under a live HfDeepSpeedConfig each rank receives only its shard.

    gather: makes partitioned parameters whole where an adapter is added to them. Raises ConfigError for quantized
    weights.
    """
    found = load_model_config(config.name, config.revision, config.trust_remote_code)
    if getattr(found, "quantization_config", None):
        raise ConfigError(
            f"model {config.name}: its weights are quantized (quantization_config in its config.json) and cannot be "
            "trained; give the checkpoint in bfloat16 or float32 that they were made from"
        )
    return _load_weights(config.name, dtype, config.revision, config.trust_remote_code, gather)


def _load_weights(
    name: str, dtype: torch.dtype, revision: str | None, trust_remote_code: bool, gather: Gather | None = None
) -> Any:
    """The causal LM, with its adapter where `name` is one.

    Raises ConfigError when the files lack weights, which transformers would draw at random, and for an encoder-decoder.
    """
    from transformers import AutoModelForCausalLM

    path = resolve_model_path(name)
    config = load_model_config(name, revision, trust_remote_code)
    if getattr(config, "is_encoder_decoder", False):  # transformers would load the decoder and leave out what it reads
        raise ConfigError(
            f"model {name}: {config.model_type} is an encoder-decoder; give a decoder-only language model"
        )
    own = {"config": config} if untied_if_files_are(config, path, revision) else {}
    model, info = _load(
        AutoModelForCausalLM,
        name,
        path,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
        **own,
    )
    _refuse_missing(name, info, "causal language model")
    if (adapter := adapter_directory(name)) is not None:
        add_adapter(model, adapter, gather)
    return with_cpu_linears(model)


def _refuse_missing(name: str, info: dict[str, Any], kind: str) -> None:
    missing = sorted(info["missing_keys"])
    if missing:
        raise ConfigError(
            f"model {name}: its files lack {len(missing)} weight{'s' * (len(missing) > 1)} "
            f"({missing[0]}{', ...' * (len(missing) > 1)}); give a complete {kind}"
        )


def load_classifier(name: str, dtype: torch.dtype) -> Any:
    """A sequence-classification model, in eval mode. Under a live HfDeepSpeedConfig each rank receives its shard.

    Raises ConfigError when the files lack weights, such as the head of a model that is no classifier.
    """
    from transformers import AutoModelForSequenceClassification

    path = resolve_model_path(name)
    model, info = _load(AutoModelForSequenceClassification, name, path, dtype=dtype, output_loading_info=True)
    _refuse_missing(name, info, "sequence-classification model")
    return model.eval()


def classifier_without_weights(config: Any) -> Any:
    """The sequence-classification model of a configuration; on the meta device it takes no memory."""
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_config(config)


def load_classifier_tokenizer(name: str) -> Any:
    """The tokenizer of a sequence-classification model. It cuts at the start; padding is for whoever batches."""
    from transformers import AutoTokenizer

    tokenizer = _load(AutoTokenizer, name, resolve_model_path(name))
    tokenizer.truncation_side = "left"
    return tokenizer


def eos_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends a completion: the generation config's and the tokenizer's.

    Raises ConfigError when there are some, and the model can sample none of them: no completion would end.
    """
    found: list[int] = []
    generation = getattr(model, "generation_config", None)
    for value in (getattr(generation, "eos_token_id", None), tokenizer.eos_token_id):
        found += value if isinstance(value, list) else [] if value is None else [value]
    entries = largest(language_part(model.config), "vocab_size")
    usable = sorted({token for token in found if _is_entry(token, entries)})
    if found and not usable:
        raise ConfigError(
            f"model {model.config.name_or_path}: EOS token {found[0]} is outside its vocabulary of {entries}, so that "
            "no completion would end: resize the model's embeddings, or set another EOS token in the tokenizer"
        )
    return usable


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the tables and warnings of transformers: what is wrong with the files becomes one line here."""
    level = transformers.utils.logging.get_verbosity()
    if os.environ.get("VDR_DEBUG") != "1":
        transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(level)


def _load(factory: Any, name: str, path: str, **arguments: Any) -> Any:
    transformers.utils.logging.disable_progress_bar()
    from_hub = path == name and not Path(path).exists()
    if from_hub:
        settle_on_cache_if_away()
    try:
        with _quiet():
            return factory.from_pretrained(path, **arguments)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise MachineError(f"model {name}: not enough memory to load it") from error
    except Exception as error:  # torn or foreign files make transformers, safetensors and pickle raise anything
        lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:2])[:300] or type(error).__name__
        if from_hub:
            raise ConfigError(
                f"model {name}: neither a local directory nor loadable from the hub ({reason})"
            ) from error
        raise ConfigError(f"model {name}: cannot be loaded from {path} ({reason})") from error
