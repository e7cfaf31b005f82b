"""Tiny random models of many architectures, and ragged completions for them."""

import copy
import inspect
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from vdr_cli.samples import Completions

SMALL = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
    "shared_intermediate_size": 8,
    "ffn_dim": 24,
    "word_embed_proj_dim": 16,
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 2,
    "n_positions": 64,
    "d_model": 16,
    "n_heads": 2,
    "n_layers": 3,
    "expansion_ratio": 2,
    "sliding_window": 4,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "logits_scaling": 0.5,
    "final_logit_softcapping": 5.0,
    "initializer_range": 0.5,
    "init_std": 0.5,
}
ARCHITECTURES = [
    "qwen2", "qwen3", "llama", "mistral", "gpt2", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "opt", "gpt_neox",
    "mixtral", "qwen2_moe", "granite", "cohere2", "falcon", "bloom", "gpt_oss", "recurrent_gemma", "lfm2", "olmo2",
    "qwen3_moe", "olmoe", "stablelm", "starcoder2", "glm4", "deepseek_v3", "qwen3_next", "gptj", "nemotron_h",
    "granitemoeshared",
]  # fmt: skip
OWN = {
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "gptj": {"rotary_dim": 4},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mlp"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "n_groups": 1,
        "ssm_state_size": 8,
        "chunk_size": 8,
    },
    "deepseek_v3": {
        "num_key_value_heads": 2,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
}


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., nn.Module]:
    """A random model of an architecture; weights large enough that members differ by more than rounding."""
    made: dict[str, nn.Module] = {}

    def build(kind: str = "qwen2", **changes: object) -> nn.Module:
        name = kind + repr(sorted(changes.items()))
        if name not in made:
            if kind not in CONFIG_MAPPING:
                pytest.skip(f"transformers {transformers.__version__} has no {kind}")
            config_class = CONFIG_MAPPING[kind]
            known = inspect.signature(config_class.__init__).parameters
            wanted = {**SMALL, **OWN.get(kind, {}), **changes}
            settings = {key: value for key, value in wanted.items() if key in known}
            torch.manual_seed(0)
            made[name] = AutoModelForCausalLM.from_config(config_class(**settings)).eval()
        return made[name]

    return build


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    """Each kind of decoder in turn."""
    return str(request.param)


@pytest.fixture
def adapted() -> Callable[[nn.Module], nn.Module]:
    """A copy of a model wrapped by PEFT, with adapters that are not 0."""
    peft = pytest.importorskip("peft")

    def wrap(model: nn.Module) -> nn.Module:
        torch.manual_seed(1)
        settings = peft.LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
        return peft.get_peft_model(copy.deepcopy(model), settings).eval()

    return wrap


@pytest.fixture
def ragged() -> Callable[..., Completions]:
    """Completions of unequal lengths under left-padded prompts."""

    def build(groups: int = 2, group_size: int = 3, prompt: int = 6, length: int = 5, seed: int = 0) -> Completions:
        generator = torch.Generator().manual_seed(seed)
        rows = groups * group_size
        prompts = torch.randint(3, 61, (groups, prompt), generator=generator)
        prompt_mask = torch.ones(groups, prompt, dtype=torch.bool)
        for group in range(groups):
            prompt_mask[group, : (2 * group) % prompt] = False
        ids = torch.randint(3, 61, (rows, length), generator=generator)
        lengths = torch.tensor([1 + (row * 3 + 1) % length for row in range(rows)])
        mask = torch.arange(length) < lengths[:, None]
        return Completions(
            torch.where(prompt_mask, prompts, 0).repeat_interleave(group_size, 0),
            prompt_mask.repeat_interleave(group_size, 0),
            torch.where(mask, ids, 0),
            mask,
            torch.zeros(rows, length),
            torch.zeros(rows, dtype=torch.bool),
        )

    return build
