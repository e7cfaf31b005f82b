"""Shared by the parts of the GPU check: arguments, model shapes, clocks and the result file."""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SCRIPTS = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(SCRIPTS), str(SCRIPTS / "bench")]

SHAPES: dict[str, dict[str, Any]] = {
    "toy": {
        "vocab_size": 1024,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "0.5B": {  # Qwen2.5-0.5B
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "7B": {  # Qwen2.5-7B
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
}


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """The arguments that every part takes."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="write the result here")
    parser.add_argument("--work", type=Path, required=True, help="directory for models and runs, shared by all parts")
    parser.add_argument("--toy", action="store_true", help="toy sizes, on the CPU")
    return parser


def device_of(toy: bool) -> torch.device:
    """The first GPU; the CPU for toy sizes. SystemExit where there is no GPU."""
    if toy:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU; --toy (--dry-run of the whole check) runs on the CPU")
    return torch.device("cuda", 0)


def dtype_of(toy: bool) -> torch.dtype:
    return torch.float32 if toy else torch.bfloat16


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write what is known so far: a part that is cut later keeps it."""
    path.write_text(json.dumps(result, indent=1) + "\n")


def build_model(shape: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A Qwen2 of this shape with random weights, in eval mode."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(**SHAPES[shape], pad_token_id=0, eos_token_id=1)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return Qwen2ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def model_directory(shape: str, work: Path, device: torch.device, dtype: torch.dtype) -> Path:
    """A saved model of this shape with a tokenizer of one token per letter; made once."""
    folder = work / f"model-{shape}"
    if not (folder / "ready").is_file():
        build_model(shape, device, dtype).save_pretrained(folder)
        letter_tokenizer(SHAPES[shape]["vocab_size"]).save_pretrained(folder)
        (folder / "ready").touch()
    return folder


def letter_tokenizer(vocabulary: int) -> Any:
    """A token per letter; the rest of the vocabulary only the model reaches."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<pad>", "<eos>", *letters, *(f"w{i}" for i in range(vocabulary - 2 - len(letters)))]
    found = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=found, pad_token="<pad>", eos_token="<eos>")


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def median_seconds(call: Callable[[], object], device: torch.device, repeats: int, warm_up: bool = True) -> float:
    """Median of `repeats` timed calls, after one that warms up."""
    if warm_up:
        call()
    return statistics.median(seconds_of(call, device) for _ in range(repeats))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a copy much larger than the caches."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**24, device=device).normal_()
    target = torch.empty_like(source)
    seconds = min(seconds_of(lambda: target.copy_(source), device) for _ in range(8))
    return 2 * source.numel() * source.element_size() / seconds


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product of random numbers."""
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out: Tensor = torch.empty_like(a)
    return 2 * n**3 / median_seconds(lambda: torch.mm(a, b, out=out), device, 10)


def peak_gigabytes(device: torch.device) -> float:
    """Most memory that tensors held on the GPU; on a CPU the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
