"""GPUs by name: what their data sheets promise."""

from __future__ import annotations

import re

PEAK_BFLOAT16 = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Floating-point operations a second without sparsity, as NVIDIA's data sheets give them; the first name that fits."""


def peak_of(device: str) -> float | None:
    """Peak bfloat16 operations per second of the GPU with this name, as torch gives it; None when unknown."""
    words = device.replace("-", " ")
    return next((peak for name, peak in PEAK_BFLOAT16.items() if re.search(rf"\b{name}\b", words)), None)
