"""Layers, branches, trunk and LM head are found in every architecture, and agree with the model's own logits."""

import inspect

import pytest
import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from vdr_cli.errors import ConfigError
from vdr_cli.models import anatomy

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
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "logit_scale": 0.3,
    "logits_scaling": 3.0,
    "final_logit_softcapping": 5.0,
}
ARCHITECTURES = [
    "qwen2", "qwen3", "llama", "mistral", "gpt2", "gemma", "gemma2", "phi", "phi3", "opt", "gpt_neox", "mixtral",
    "qwen2_moe", "granite", "cohere", "hyperclovax", "falcon", "bloom", "mpt", "biogpt", "llama4_text", "gpt_oss",
    "granitemoeshared",
]  # fmt: skip


def tiny(kind: str) -> nn.Module:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    config_class = CONFIG_MAPPING[kind]
    known = inspect.signature(config_class.__init__).parameters
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_class(**{k: v for k, v in SMALL.items() if k in known})).eval()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_head_of_trunk_is_the_models_logits(kind: str) -> None:
    model = tiny(kind)
    ids = torch.tensor([[0, 0, 5, 6, 7], [3, 4, 5, 6, 7]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    arguments = anatomy.forward_arguments(model, mask, anatomy.position_ids(mask))
    with torch.no_grad():
        ours = anatomy.output_head(model).logits(anatomy.backbone(model)(input_ids=ids, **arguments)[0])
        theirs = model(input_ids=ids, **arguments).logits
    torch.testing.assert_close(ours, theirs)
    anatomy.check_head(model)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_branches_are_all_that_a_layer_adds(kind: str) -> None:
    """With both branches at zero every layer is the identity: the two modules are the whole residual update."""
    model = tiny(kind)
    layers = anatomy.decoder_layers(model)
    assert len(layers) == anatomy.text_config(model).num_hidden_layers
    seen: list[torch.Tensor] = []

    def zero(module: nn.Module, arguments: object, output: object) -> object:
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    def keep(module: nn.Module, arguments: tuple, output: object) -> None:
        inputs = arguments[0] if arguments else None
        seen.append(inputs)
        seen.append(output[0] if isinstance(output, tuple) else output)

    for layer in layers:
        layer.register_forward_hook(keep)
        for block in anatomy.residual_blocks(layer):
            block.register_forward_hook(zero)
    with torch.no_grad():
        model(input_ids=torch.tensor([[3, 4, 5]]))
    assert len(seen) == 2 * len(layers)
    for entered, left in zip(seen[::2], seen[1::2], strict=True):
        torch.testing.assert_close(entered.reshape(left.shape), left)


def test_the_soft_cap_of_recurrent_gemma_is_found_under_its_own_name() -> None:
    model = tiny("recurrent_gemma")
    model.config.logits_soft_cap = 0.05  # moves logits of this size
    assert anatomy.output_head(model).softcap == 0.05
    anatomy.check_head(model)


def test_layers_run_in_order() -> None:
    model = tiny("qwen2")
    ran: list[int] = []
    for number, layer in enumerate(anatomy.decoder_layers(model)):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    model(input_ids=torch.tensor([[3]]))
    assert ran == [0, 1, 2]


def test_peft_wrapped_model_is_seen_through() -> None:
    peft = pytest.importorskip("peft")
    model = tiny("qwen2")
    plain = anatomy.decoder_layers(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2))
    assert anatomy.decoder_layers(wrapped) == plain
    assert anatomy.output_head(wrapped).weight is model.get_output_embeddings().weight
    anatomy.check_head(wrapped)


def test_unknown_blocks_name_the_setting() -> None:
    layer = nn.Module()
    layer.mixer_one, layer.mixer_two = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"disagreement\.blocks.*mixer_one, mixer_two"):
        anatomy.residual_blocks(layer)
    found = anatomy.residual_blocks(layer, {"attention": "mixer_one", "mlp": "mixer_two"})
    assert found == (layer.mixer_one, layer.mixer_two)
    with pytest.raises(ConfigError, match="no block 'nothing'"):
        anatomy.residual_blocks(layer, {"attention": "nothing"})
    with pytest.raises(ConfigError, match="unknown key 'ffn'"):
        anatomy.residual_blocks(layer, {"ffn": "mixer_one"})


def test_a_layer_may_be_one_branch() -> None:
    layer = nn.Module()
    layer.norm, layer.mixer = nn.LayerNorm(2), nn.Linear(2, 2)
    assert anatomy.residual_blocks(layer) == (layer.mixer,)
    layer.gate_mixer = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"no mlp block.*one of: mixer, gate_mixer; or set disagreement\.mode"):
        anatomy.residual_blocks(layer)


def test_a_model_that_cannot_be_read_is_refused_in_one_line() -> None:
    model = tiny("llama")
    model.model.layers[0].mlp.up_proj = nn.Linear(3, 24)
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM cannot read four tokens \(mat1 and mat2") as refused:
        anatomy.check_head(model)
    assert "\n" not in str(refused.value)


def test_logits_that_are_not_a_known_map_are_refused() -> None:
    model = tiny("llama")
    model.lm_head.register_forward_hook(lambda module, arguments, output: output + output.roll(1, -1))
    with pytest.raises(ConfigError, match="not supported"):
        anatomy.check_head(model)


def test_position_ids_start_at_the_first_valid_token() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert anatomy.position_ids(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


def test_alibi_models_get_no_position_ids() -> None:
    mask = torch.ones(1, 2)
    assert set(anatomy.forward_arguments(tiny("bloom"), mask, mask)) == {"attention_mask"}
