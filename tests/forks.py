"""Runs of `vdr`, each in a fork of this process, which has imported once what every run imports: five seconds' work.

A line on stdin is a run: {"arguments": [...], "environment": {...}, "said": [PATH OF STDOUT, OF STDERR]}. Its answer, a
line on stdout, is the exit code, negative when a signal ended the run.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from typing import Any, NoReturn

IMPORTED = (
    "vdr_cli.train",
    "vdr_cli.cli.app",
    "vdr_cli.cli.training",
    "vdr_cli.observe.live",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.ops.op_builder.all_ops",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.auto.tokenization_auto",
    "transformers.integrations.deepspeed",
    "datasets",
    "pandas",
    "pyarrow.parquet",
    "rich.console",
)


def vdr(run: dict[str, Any]) -> NoReturn:
    """`python -m vdr_cli` in this process, to its end."""
    os.environ.clear()
    os.environ.update(run["environment"])
    for descriptor, path in enumerate((os.devnull, *run["said"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), descriptor)
    sys.argv = ["vdr", *run["arguments"]]
    try:
        importlib.import_module("vdr_cli.cli.app").main()
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    importlib.import_module("vdr_cli.engine.library").leave_muon_uncompiled()
    for name in IMPORTED:
        importlib.import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            vdr(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
