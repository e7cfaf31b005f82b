"""Small tokenizers, a token a byte, with the chat templates of five families in short."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"
_IM = (
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ CONTENT }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_THOUGHTLESS = (
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}"
    "{% else %}{{ m.content }}{% endif %}"
)
QWEN = "<|im_start|>system\nYou help. For each call return <tool_call></tool_call>." + _TOOLS + "<|im_end|>\n"
TEMPLATES = {
    "qwen2.5": QWEN + _IM.replace("{{ CONTENT }}", "{{ m.content }}"),
    "qwen3": QWEN + _IM.replace("{{ CONTENT }}", _THOUGHTLESS),
    "llama3": (
        '<|begin|>{% if tools %}Give a JSON with "name" and "parameters".{{ tools | tojson }}{% endif %}'
        "{% for m in messages %}<|start|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end|>\n\n"
        "{{ m.content | trim }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
    ),
    "mistral": (
        "<s>{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
        "{% set ns = namespace(user=true) %}{% for m in messages %}{% if m.role != 'tool' %}"
        "{% if (m.role == 'user') != ns.user %}{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% set ns.user = not ns.user %}{% endif %}"
        "{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
        "{% elif m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}{{ raise_exception('id') }}{% endif %}"
        "[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]"
        "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}{# [TOOL_CALLS] #}"
    ),
    "gemma": (
        "<bos>{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('unknown role tool') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
}
ENDS = {
    "qwen2.5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "llama3": "<|eot|>",
    "mistral": "</s>",
    "gemma": "<end_of_turn>",
}
SPECIAL = [
    *dict.fromkeys(ENDS.values()), "<|im_start|>", "<|begin|>", "<|start|>", "<|end|>", "<s>", "[INST]", "[/INST]",
    "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "<bos>",
    "<start_of_turn>",
]  # fmt: skip


def tokenizer_of(name: str) -> Any:
    """The tokenizer of a family; "plain" has no chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    end = ENDS.get(name, "<|im_end|>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, pad_token=end)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = TEMPLATES.get(name)
    return tokenizer


@pytest.fixture
def plain() -> Any:
    return tokenizer_of("plain")
