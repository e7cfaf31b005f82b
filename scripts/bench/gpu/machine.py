"""The card, the software on the machine, and the two ceilings: memory bandwidth and the rate of matrix products."""

from __future__ import annotations

import importlib.metadata
import platform

import torch
from common import copy_bandwidth, device_of, dtype_of, parser_of, product_rate, write_result

PACKAGES = ("torch", "transformers", "deepspeed", "accelerate", "trl", "peft", "datasets", "triton", "flash-attn")


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    args = parser_of(__doc__).parse_args()
    device = device_of(args.toy)
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else platform.processor() or "CPU"
    bandwidth, rate = copy_bandwidth(device), product_rate(device, dtype_of(args.toy))
    found = {package: version(package) for package in PACKAGES}
    write_result(
        args.json,
        {
            "card": name,
            "memory_gb": round(torch.cuda.get_device_properties(device).total_memory / 1e9, 1) if cuda else None,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
            "versions": found,
            "copy_bytes_per_second": bandwidth,
            "product_flops": rate,
            "headlines": [
                f"{name}; copy {bandwidth / 1e12:.2f} TB/s, matrix product {rate / 1e12:.0f} TFLOP/s",
                ", ".join(f"{package} {number or 'missing'}" for package, number in found.items()),
            ],
        },
    )


if __name__ == "__main__":
    main()
