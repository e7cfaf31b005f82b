"""The policy's gradient under ZeRO-3 in each way of reading, against one process without DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import Run
from vdr_cli.models.policy import Policy

pytestmark = pytest.mark.integration

PROGRAMS = Path(__file__).parent / "programs"
WORKER = PROGRAMS / "zero3_worker.py"

DS_CONFIG = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
    }
}


def micro_batches() -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Four of different shapes: two prompts; one-token completions; no valid token; one prompt."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for owners, width, height, lengths in (
        ([0, 0, 1], 5, 4, [4, 2, 3]),
        ([2, 2], 3, 1, [1, 1]),
        ([3, 3], 4, 3, [0, 0]),
        ([4, 4, 4], 6, 2, [2, 1, 2]),
    ):
        prompts = torch.randint(3, 41, (5, width), generator=generator)[owners]
        tokens = {
            "prompt_ids": prompts,
            "prompt_mask": torch.ones_like(prompts, dtype=torch.bool),
            "completion_ids": torch.randint(3, 41, (len(owners), height), generator=generator),
            "completion_mask": torch.arange(height)[None] < torch.tensor(lengths)[:, None],
        }
        made.append((tokens, torch.randn(2, len(owners), height, generator=generator)))
    return made


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: folder_of(tmp_path_factory.mktemp(kind), kind) for kind in ("qwen2", "llama")}


def folder_of(path: Path, kind: str) -> Path:
    """A tiny model with weights large enough for real gradients, the batches, the expected gradient."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        vocab_size=41,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path)
    (path / "ds.json").write_text(json.dumps(DS_CONFIG))
    batches = micro_batches()
    torch.save(batches, path / "batches.pt")
    for tokens, coefficients in batches:
        logps, entropy = Policy(model, share_prompts=False)(**tokens, temperature=0.7)
        (coefficients[0] * logps + coefficients[1] * entropy).sum().backward()
    torch.save({name: p.grad for name, p in model.named_parameters()}, path / "expected.pt")
    return path


@pytest.mark.parametrize(
    ("how", "kind", "world_size"),
    [
        ("plain", "qwen2", 2),
        ("share", "qwen2", 2),
        ("trees", "qwen2", 2),
        ("packed", "qwen2", 2),
        ("sequence", "qwen2", 2),
        ("sequence", "llama", 4),
    ],
)
def test_gradient_is_that_of_one_plain_process_and_each_rank_holds_its_share(
    folders: dict[str, Path], how: str, kind: str, world_size: int, forked: Run
) -> None:
    folder = folders[kind]
    ended = forked(str(WORKER), str(folder), how, ranks=world_size)
    assert ended.returncode == 0, ended.stderr[-3000:]
    for rank in range(world_size):
        held, whole, resident = torch.load(folder / f"held{rank}.pt")
        share = whole / world_size
        assert share <= held <= share + 16 * world_size and resident == 0  # other numbers of elements are padded
    expected = torch.load(folder / "expected.pt")
    gradients = torch.load(folder / "gradients.pt")
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        # DeepSpeed keeps the mean over ranks of the ranks' sums, which backward() scales to the sum
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm() + 1e-7, name
    if how == "sequence":
        assert_each_rank_has_read_its_rows(folder, world_size)


def assert_each_rank_has_read_its_rows(folder: Path, world_size: int) -> None:
    tokens, _ = micro_batches()[0]
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        expected = Policy(model, share_prompts=False)(**tokens, temperature=0.7)
    for rank in range(world_size):
        for found, whole in zip(torch.load(folder / f"read{rank}.pt"), expected, strict=True):
            torch.testing.assert_close(found, whole[: 1 + rank % 3], rtol=1e-5, atol=1e-6)
        for divided, alone in torch.load(folder / f"measured{rank}.pt"):
            for found, whole in zip(divided, alone, strict=True):
                torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)
            assert alone[0].max() > 1e-3
