"""DeepSpeed's compiled operators: those that are installed, and those that this machine could build."""

from __future__ import annotations

import contextlib
import io

SHOWN = ("cpu_adam", "fused_adam", "async_io", "transformer_inference")


def operators() -> list[tuple[str, bool, bool]]:
    """Name, whether it is installed, whether it could be compiled when first used."""
    from vdr_cli.engine import deepspeed_import

    installed_ops = deepspeed_import.module("git_version_info").installed_ops
    builders = deepspeed_import.module("ops.op_builder.all_ops").ALL_OPS
    found = []
    for name in SHOWN:
        builder = builders.get(name)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            compatible = builder is not None and bool(builder.is_compatible(verbose=False))
        found.append((name, bool(installed_ops.get(name, False)), compatible))
    return found
