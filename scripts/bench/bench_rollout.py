"""Sampling time of our transformers backend against transformers' own generate, in turn, in one run.

    python scripts/bench/bench_rollout.py [--prompt 128] [--new 64] [--group 8] [--repeats 5] [--json PATH]

The default case is a 66.6M-parameter Qwen2 (d 512, 12 layers, vocabulary 32,000), random weights, 16
completions of 64 tokens after 128. No completion ends early, so both sides decode the same number of tokens.
Printed: medians, their ratio, and how far we are from the memory-bandwidth limit of decoding: the time
to read every weight once a token step and every cached key and value once a row and step. With --compile also
ours with norms and activations compiled by torch.compile: what stands between the matrix products.
"""

from __future__ import annotations

import copy
import statistics

import torch
from harness import parser_of, seconds_of, write_results
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from vdr_cli.models.anatomy import decoder_layers, output_head
from vdr_cli.rollout.base import RolloutRequest
from vdr_cli.rollout.transformers_backend import TransformersRollout
from vdr_cli.samples import Sampling

PAD = 0


def build_model(layers: int, width: int, vocabulary: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(width // 256, 1),
        tie_word_embeddings=False,
        pad_token_id=PAD,
    )
    return Qwen2ForCausalLM(config).eval()


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second of reading a tensor much larger than the caches."""
    data = torch.ones(64 << 20, device=device)
    return data.numel() * data.element_size() / min(seconds_of(data.sum, device.type)[0] for _ in range(9))


def bytes_read(model: PreTrainedModel, rows: int, prompt: int, new: int) -> int:
    """Least bytes that decoding reads: weights once a step (not the embedding table), the cache once a row and step."""
    config, size = model.config, next(model.parameters()).element_size()
    embedding = model.get_input_embeddings().weight.numel() if not config.tie_word_embeddings else 0
    weights = sum(parameter.numel() for parameter in model.parameters()) - embedding
    assert output_head(model).weight.numel() < weights
    head_dim = config.hidden_size // config.num_attention_heads
    column = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    cached = sum(prompt + t for t in range(1, new))
    return size * ((new - 1) * weights + rows * column * cached)


def compiled_between_products(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with compiled norms and activations; inductor refuses linear maps whose product is oneDNN's packed one."""
    other = copy.deepcopy(model)
    for layer in decoder_layers(other):
        for part in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp.act_fn):
            part.compile(dynamic=True)
    return other


def transformers_generate(model: PreTrainedModel, ids: Tensor, group: int, new: int) -> Tensor:
    config = GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=new, pad_token_id=PAD, eos_token_id=None
    )
    rows = ids.repeat_interleave(group, 0)
    return model.generate(rows, attention_mask=torch.ones_like(rows), generation_config=config)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    model = build_model(args.layers, args.width, args.vocabulary).to(device, getattr(torch, args.dtype))
    ids = torch.randint(1, args.vocabulary, (args.prompts, args.prompt), device=device)
    rollout = TransformersRollout(PAD, [])
    keys, sampling = list(range(args.prompts)), Sampling(max_new_tokens=args.new)
    ours, theirs = [], []
    for _ in range(args.repeats + 1):
        ours.append(
            seconds_of(
                lambda: rollout.generate(model, RolloutRequest(ids.tolist(), args.group, sampling, keys)), device.type
            )
        )
        theirs.append(seconds_of(lambda: transformers_generate(model, ids, args.group, args.new), device.type))
    pairs = list(zip(ours, theirs, strict=True))[1:]  # the first of each warms up
    own, other = (statistics.median(wall for wall, _ in side[1:]) for side in (ours, theirs))
    ratio, cpu_ratio = (statistics.median(a[kind] / b[kind] for a, b in pairs) for kind in (0, 1))
    rows = args.prompts * args.group
    limit = bytes_read(model, rows, args.prompt, args.new) / read_bandwidth(device)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"model       {size / 1e6:.1f}M parameters, {args.dtype}, {device}, {args.threads} threads")
    print(f"case        {rows} completions x ({args.prompt} + {args.new}) tokens, groups of {args.group}")
    print(f"vdr         {own:.2f} s   {rows * args.new / own:.0f} tokens/s   (median of {args.repeats})")
    print(f"generate    {other:.2f} s   {rows * args.new / other:.0f} tokens/s")
    print(f"ratio       {ratio:.2f} wall, {cpu_ratio:.2f} processor time   (medians of the pairs; asked: at most 0.50)")
    print(f"limit       {limit:.2f} s   memory bandwidth; we take {own / limit:.1f} times as long")
    results = {"seconds": {"vdr": own, "generate": other, "bandwidth_limit": limit}, "parameters": size}
    write_results(args.json, {**results, "ratio": ratio, "cpu_ratio": cpu_ratio})
    if args.compile:
        compiled = compiled_between_products(model)
        first, *pairs = (
            [
                seconds_of(
                    lambda m=m: rollout.generate(m, RolloutRequest(ids.tolist(), args.group, sampling, keys)),
                    device.type,
                )[0]
                for m in both
            ]
            for both in [(compiled, model)] * (args.repeats + 1)
        )
        ratio = statistics.median(ours / plain for ours, plain in pairs)
        print(f"compiled    {ratio:.2f} times as long as not, after {first[0] - first[1]:.1f} s to compile")


if __name__ == "__main__":
    main()
