"""Runs of `vdr`, each in forks of this process, which has imported once what every run imports: five seconds' work.

A line on stdin is a run: {"arguments": [...], "environments": [one a rank, ...], "said": [PATH OF STDOUT, OF STDERR]}.
Where the first argument is a file of Python, that program runs instead, with the other arguments.
Its answer, a line on stdout, is the first exit code that is not 0, negative when a signal ended the rank, or 0.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from vdr_cli.system.imports import importing
from vdr_cli.system.processes import end_process

IMPORTED = (
    "vdr_cli.train",
    "vdr_cli.cli.app",
    "vdr_cli.cli.training",
    "vdr_cli.training.live",
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


def import_all(names: Iterable[str]) -> None:
    """Import these before the forks are made; DeepSpeed first, as a run does."""
    with importing():
        importlib.import_module("vdr_cli.engine.deepspeed_import").leave_muon_uncompiled()
        for name in names:
            importlib.import_module(name)


def be_rank(arguments: list[str], environment: dict[str, str], said: list[str]) -> NoReturn:
    """The program in this process, to its end."""
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in enumerate((os.devnull, *said)):
        os.dup2(os.open(path, os.O_RDWR | os.O_APPEND), descriptor)
    code: object = 0
    try:
        program(arguments)
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    end_process(code)


def program(arguments: list[str]) -> None:
    """`python FILE.py ...`, or `vdr ...`."""
    if arguments[0].endswith(".py"):
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")
    else:
        sys.argv = ["vdr", *arguments]
        importlib.import_module("vdr_cli.cli.app").main()


def run_of(arguments: list[str], environments: list[dict[str, str]], said: list[str]) -> int:
    for environment in environments:
        if os.fork() == 0:
            be_rank(arguments, environment, said)
    codes = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in environments]
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    import_all(IMPORTED)
    for line in sys.stdin:
        print(run_of(**json.loads(line)), flush=True)
