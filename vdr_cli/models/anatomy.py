"""Knowledge about Hugging Face decoders, in one place: layers, residual branches, trunk, LM head.

Everything is found by structure first and by common names second, so that a new architecture usually
needs no entry here. What is found is checked against the model itself by `check_head`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vdr_cli.errors import ConfigError
from vdr_cli.models.head import Head, used_entries
from vdr_cli.models.sizes import EXPERT_COUNTS, largest

ATTENTION_NAMES = (
    "self_attn",
    "attn",
    "attention",
    "self_attention",
    "norm_attn_norm.attn",
    "linear_attn",
    "mamba",
    "conv",
    "temporal_block",
    "mixer",
)
"""Names of the token-mixing block inside a decoder layer, the commonest first."""

MLP_NAMES = (
    "mlp",
    "block_sparse_moe",
    "feed_forward",
    "ffn",
    "moe",
    "mlp_block",
    "shared_mlp",
    "fc2",
)
"""Names of the MLP or MoE block. fc2 last: OPT, BioGPT and XGLM keep both linear maps in the layer itself."""

BESIDE_MLP = "shared_mlp"
"""Name of an MLP whose output a layer adds to that of its experts (Granite MoE): the two are one branch."""

OUTPUT_PROJECTIONS = ("dense", "dense_4h_to_h", "out_proj", "down_proj")
"""Last linear map of a block that adds the residual itself (Bloom, MPT): its output is the branch."""

WholeLayer = Callable[[int], AbstractContextManager[Any]]
"""Takes the number of a layer; inside the block that it opens, the weights of that layer are whole.

Collective where they are sharded.
"""


def unwrapped(model: nn.Module) -> nn.Module:
    """The causal LM inside a PEFT wrapper, or the model itself."""
    inner: Callable[[], nn.Module] | None = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def input_embeddings(model: nn.Module) -> nn.Embedding:
    """The table that turns token ids into vectors."""
    find: Callable[[], nn.Embedding] = unwrapped(model).get_input_embeddings  # type: ignore[assignment]
    return find()


def text_config(model: nn.Module) -> Any:
    """The configuration of the language part (multimodal models keep it one level down)."""
    config: Any = unwrapped(model).config
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


@contextmanager
def attention_replaced(model: nn.Module, name: str) -> Iterator[None]:
    """Inside the block the model's attention is the one that transformers' AttentionInterface knows by this name."""
    config = text_config(model)
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def has_experts(model: nn.Module) -> bool:
    """A mixture of experts: a token goes through some of the MLPs only."""
    config = text_config(model)
    return bool(largest(config, *EXPERT_COUNTS))


def backbone(model: nn.Module) -> nn.Module:
    """The decoder without LM head; called, its first output is the hidden state after the final norm."""
    causal_lm: Any = unwrapped(model)
    found = causal_lm.get_decoder() if hasattr(causal_lm, "get_decoder") else causal_lm
    for name in (getattr(causal_lm, "base_model_prefix", ""), "model", "transformer"):
        if found is causal_lm and isinstance(getattr(causal_lm, name, None), nn.Module):
            found = getattr(causal_lm, name)
    if found is causal_lm:
        raise ConfigError(
            f"model: {type(causal_lm).__name__} has no decoder separate from its LM head; "
            "give a Hugging Face causal language model (AutoModelForCausalLM)"
        )
    return found


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers in order of execution.

    They are the outermost module list of the trunk with as many entries as the configuration has layers.
    """
    trunk = backbone(model)
    count = getattr(text_config(model), "num_hidden_layers", None)
    lists = [
        (name.count("."), -len(module), list(module))
        for name, module in trunk.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 0 and (count is None or len(module) == count)
    ]
    if not lists:
        raise ConfigError(
            f"disagreement.blocks: no list of {count} decoder layers found in {type(unwrapped(model)).__name__}; "
            "this architecture has no residual layers that members could differ in: set disagreement.mode to none"
        )
    return min(lists, key=lambda entry: entry[:2])[2]


def residual_blocks(layer: nn.Module, blocks: dict[str, str] | None = None) -> tuple[nn.Module, ...]:
    """The modules of a decoder layer whose outputs are its residual branches: (attention, MLP or MoE), or the only one.

    Modules from the second on are parts of one branch: the layer adds up their outputs. A layer of Mamba 2 or
    Nemotron-H is one branch. blocks: names of the two when they are not found, {"attention": ..., "mlp": ...}; dots
    reach inside. Raises ConfigError when one is not found.
    """
    given = blocks or {}
    unknown = sorted(set(given) - {"attention", "mlp"})
    if unknown:
        raise ConfigError(f"disagreement.blocks: unknown key {unknown[0]!r}; the keys are attention and mlp")
    attention = _block(layer, "attention", given.get("attention"), ATTENTION_NAMES)
    if not given and _is_only_branch(layer, attention):
        return (attention,)
    mlp = _block(layer, "mlp", given.get("mlp"), MLP_NAMES)
    beside = None if given.get("mlp") else _submodule(layer, BESIDE_MLP)
    return (attention, mlp) if beside in (None, mlp) else (attention, mlp, beside)  # type: ignore[return-value]


def _is_only_branch(layer: nn.Module, block: nn.Module) -> bool:
    """True if beside this block the layer has nothing but norms and dropout."""
    others = [type(child).__name__.lower() for child in layer.children() if child is not block]
    return all("norm" in name or name in ("dropout", "identity") for name in others)


def _block(layer: nn.Module, role: str, given: str | None, names: tuple[str, ...]) -> nn.Module:
    for name in (given,) if given else names:
        module = _submodule(layer, name)
        if module is not None:
            return module if given else _branch(module)
    children = [name for name, child in layer.named_children() if "norm" not in type(child).__name__.lower()]
    what = f"has no block {given!r}" if given else f"has no {role} block that is known by name"
    raise ConfigError(
        f"disagreement.blocks: {type(layer).__name__} {what}; give its name as blocks: {{{role}: NAME}}, "
        f"one of: {', '.join(children) or 'none'}; or set disagreement.mode to none"
    )


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    for name in path.split("."):
        child = getattr(module, name, None)
        if not isinstance(child, nn.Module):
            return None
        module = child
    return module


def _branch(block: nn.Module) -> nn.Module:
    """The block, or its output projection when the block takes the residual and adds it itself.

    Masking such a block's output would drop the residual stream, not the branch.
    """
    if "residual" not in inspect.signature(block.forward).parameters:
        return block
    for name in OUTPUT_PROJECTIONS:
        projection = _submodule(block, name)
        if projection is not None:
            return projection
    return block


def output_head(model: nn.Module) -> Head:
    """The LM head with the scale and soft cap that the architecture puts on its logits."""
    causal_lm: Any = unwrapped(model)
    linear = causal_lm.get_output_embeddings() if hasattr(causal_lm, "get_output_embeddings") else None
    if linear is None or not hasattr(linear, "weight"):
        raise ConfigError(f"model: {type(causal_lm).__name__} has no LM head; give a causal language model")
    if hasattr(linear, "base_layer"):  # PEFT's: applied in chunks, the weight alone would leave the adapter out
        raise ConfigError("model.lora.targets: the LM head cannot have an adapter; leave it out of the list")
    config = text_config(model)
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma 2; RecurrentGemma; xLSTM
    softcap = next((cap for name in caps if (cap := getattr(config, name, None)) is not None), None)
    return Head(
        weight=linear.weight,
        bias=getattr(linear, "bias", None),
        scale=_logit_scale(causal_lm, config),
        softcap=None if softcap is None else float(softcap),
    )


def _logit_scale(causal_lm: Any, config: Any) -> float:
    """The factor on the logits: Granite divides, HyperCLOVA X multiplies by the key of the same name."""
    kind = str(getattr(config, "model_type", ""))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is not None:
        return float(scaling) if kind.startswith("hyperclovax") else 1.0 / float(scaling)
    if isinstance(getattr(causal_lm, "logit_scale", None), (int, float)):  # Cohere; MPT's config has one it ignores
        return float(causal_lm.logit_scale)
    for key in ("lm_head_multiplier", "output_multiplier"):  # Falcon-H1; Muse
        if getattr(config, key, None) is not None:
            return float(getattr(config, key))
    return 1.0


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Compare trunk and head with the model's own logits on a few tokens; ConfigError when they differ.

    The guard for architectures that do something to the logits which `output_head` does not know.
    """
    causal_lm: Any = unwrapped(model)
    head = output_head(model)
    ids = torch.arange(4, device=head.weight.device)[None] % head.weight.shape[0]
    mask = torch.ones_like(ids)
    try:
        arguments = forward_arguments(model, mask, position_ids(mask))
        ours = head.logits(backbone(model)(input_ids=ids, **arguments)[0]).float()
        theirs = causal_lm(input_ids=ids, **arguments)[0].float()
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"model: {type(causal_lm).__name__} cannot read four tokens ({reason}); its code and its config.json do "
            "not fit each other"
        ) from error
    used = used_entries(theirs)
    tolerance = 1e-4 if head.weight.dtype == torch.float32 else 5e-2
    largest_logit = float(theirs[used].abs().max())
    same = torch.allclose(ours[used], theirs[used], rtol=tolerance, atol=tolerance * largest_logit)
    if not same or bool(used_entries(ours)[~used].any()):
        raise ConfigError(
            f"model: the logits of {type(causal_lm).__name__} are not a scaled or soft-capped linear map of its "
            "decoder's output, which vdr needs to compute them in chunks; this architecture is not supported"
        )


def position_ids(mask: Tensor) -> Tensor:
    """(B, W) mask to (B, W) positions: 0 at the first valid token, so left padding shifts nothing."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


def forward_arguments(model: nn.Module, attention_mask: Tensor, positions: Tensor) -> dict[str, Tensor]:
    """Keyword arguments of the trunk; position_ids only where the architecture has them (not ALiBi)."""
    arguments = {"attention_mask": attention_mask.long()}
    if "position_ids" in inspect.signature(backbone(model).forward).parameters:
        arguments["position_ids"] = positions
    return arguments


def last_logits_argument(model: nn.Module) -> dict[str, int]:
    """Keyword argument that makes a causal LM compute the last position's logits only, where its forward has one."""
    has_one = "logits_to_keep" in inspect.signature(unwrapped(model).forward).parameters
    return {"logits_to_keep": 1} if has_one else {}


def cache_arguments(model: nn.Module, cache: Any) -> dict[str, Any]:
    """Keyword arguments that make a trunk or causal LM read and write this cache; None: without one.

    transformers renamed `past_key_values` to `cache` in 5.24.
    """
    if cache is None:
        return {"use_cache": False}
    parameters = inspect.signature(unwrapped(model).forward).parameters
    return {"cache" if "cache" in parameters else "past_key_values": cache, "use_cache": True}
