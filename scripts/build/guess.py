"""Build the model of the game `guess`: a small Qwen2 that plays by the rules and badly.

    python scripts/build/guess.py --output vdr_cli/beds/shipped/guess/model

It learns from games whose player halves what the answers leave or guesses anywhere in the range: first it mostly halves
(LEARN), towards the end rarely (DOUBT). So it knows how to play and seldom does, which leaves reinforcement learning
something to find. Held-out problems are never read. The seed and one thread make the result repeat on one machine.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from functools import cache
from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.utils import get_json_schema

from vdr_cli.beds.guess import GUESSES, LOWEST, WIDTH, Guess, problems, prompt

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
from bed import IGNORED, PAD, fit
from harness import write_results

LEARN, DOUBT = 0.75, 0.3
"""Share of guesses that halve what the answers leave: in the first four fifths of the steps, and in the last one."""
STEPS, BATCH, PEAK = 600, 48, 5e-3
OPEN, CLOSE, END = '<tool_call>\n{"name": "guess", "arguments": {"number": ', "}}\n</tool_call>", "<|im_end|>"
PIECES = [
    "<|im_start|>user\n", "<|im_start|>system\n", "\n<|im_start|>user\n", "\n<|im_start|>tool\n",
    "\n<|im_start|>assistant\n", OPEN, CLOSE, "higher", "lower", "found", "over", "ok", "guess", " to ",
    *map(str, range(1, LOWEST[-1] + WIDTH)),
]  # fmt: skip
"""Texts that are one token each; any other text is written in characters."""
TEMPLATE = """\
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool.function.name }}{% endfor %}<|im_end|>{% endif %}
{%- for message in messages %}{% if tools or not loop.first %}{{ "\\n" }}{% endif %}<|im_start|>{{ message.role }}
{% if message.role == "assistant" %}{% generation %}
{%- if message.content %}{{ message.content }}{% endif %}
{%- for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>{% endgeneration %}{% else %}{{ message.content }}<|im_end|>{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "\\n" }}<|im_start|>assistant
{% endif %}"""
"""A message begins with the line break before it: a conversation is a prefix of its continuation, in tokens too."""


def build_tokenizer() -> Qwen2Tokenizer:
    """Characters, and a token for each of PIECES."""
    characters = ["Ġ", "Ċ", *map(chr, range(33, 127))]
    vocabulary = {token: index for index, token in enumerate(["<pad>", END, *characters])}
    made = Qwen2Tokenizer(
        vocab=vocabulary, merges=[], unk_token=None, pad_token="<pad>", eos_token=END, padding_side="left"
    )
    made.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in PIECES])
    made.chat_template = TEMPLATE
    return made


def game(rng: random.Random, low: int, secret: int, share: float) -> tuple[list[str], list[str]]:
    """The answers of one game, and what the player says. share: of guesses that halve what the answers leave."""
    environment = Guess()
    environment.reset(secret=secret)
    first, last, said, replies = low, low + WIDTH - 1, [], []
    for _ in range(GUESSES):
        halves = rng.random() < share
        number = (first + last) // 2 if halves else rng.randint(low, low + WIDTH - 1)
        said.append(f"{OPEN}{number}{CLOSE}")
        replies.append(environment.guess(number))
        if replies[-1] in ("found", "over"):
            break
        first, last = (max(first, number + 1), last) if replies[-1] == "higher" else (first, min(last, number - 1))
    return replies, [*said, "ok"]


class Encoder:
    """Games as token ids; every text is tokenised once."""

    def __init__(self, tokenizer: Qwen2Tokenizer) -> None:
        self.tokenizer, self.tools = tokenizer, [get_json_schema(Guess.guess)]
        self.ids = cache(lambda text: tokenizer(text)["input_ids"])
        self.prompt = cache(self._prompt)

    def _prompt(self, low: int) -> list[int]:
        settings = {"tools": self.tools, "add_generation_prompt": True, "tokenize": False}
        return self.ids(self.tokenizer.apply_chat_template(prompt(low), **settings))

    def game(self, rng: random.Random, share: float) -> tuple[list[int], list[int]]:
        """Token ids of a game and the targets: the player's tokens alone."""
        low, secret = rng.choice(problems("train"))
        replies, said = game(rng, low, secret, share)
        ids = list(self.prompt(low))
        targets = [IGNORED] * len(ids)
        for index, words in enumerate(said):
            own = self.ids(words + END)
            ids, targets = ids + own, targets + own
            if index < len(replies):
                given = self.ids(f"\n<|im_start|>tool\n{replies[index]}{END}\n<|im_start|>assistant\n")
                ids, targets = ids + given, targets + [IGNORED] * len(given)
        return ids, targets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the seconds that it took here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    start, cpu = time.monotonic(), time.process_time()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    tokenizer = build_tokenizer()
    encoder = Encoder(tokenizer)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=True, pad_token_id=PAD,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, tokenizer.eos_token_id
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    rng = random.Random(arguments.seed)

    def games_at(step: int) -> list[tuple[list[int], list[int]]]:
        share = LEARN if step < 0.8 * arguments.steps else DOUBT
        return [encoder.game(rng, share) for _ in range(BATCH)]

    fit(model, games_at, arguments.steps, PEAK, warmup=50)
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    write_results(arguments.json, {"seconds": time.monotonic() - start, "cpu_seconds": time.process_time() - cpu})


if __name__ == "__main__":
    main()
