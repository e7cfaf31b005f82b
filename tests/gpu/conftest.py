"""Every test here has two devices: CUDA, marked gpu, and the CPU, so that on a GPU the test itself is not what fails.

On a machine with a GPU: pytest tests/gpu -m gpu. Elsewhere the same functions run on the CPU with the other tests.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # gpu_reference.py, which the tests share

CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=CUDA)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device under test."""
    return torch.device(request.param)


@pytest.fixture(scope="session", params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The model's weights."""
    return getattr(torch, request.param)  # type: ignore[no-any-return]


@pytest.fixture(
    scope="module",
    params=["cpu-float32", *(pytest.param(f"cuda-{name}", marks=CUDA) for name in ("float32", "bfloat16"))],
)
def place(request: pytest.FixtureRequest) -> tuple[torch.device, str]:
    """(device, dtype) of whole runs, which are too slow for the CPU to make them in both."""
    where, name = request.param.split("-")
    return torch.device(where), name


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    """Float32 products keep float32."""
    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = cudnn
