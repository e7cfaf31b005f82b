"""A variable of the environment that makes no sense is named."""

from __future__ import annotations

import pytest

from vdr_cli.errors import ConfigError
from vdr_cli.system.variables import check_for_deepspeed, whole_number


def test_a_number_or_its_default() -> None:
    assert whole_number({"TASKS": " 4"}, "TASKS", 1) == 4
    assert whole_number({}, "TASKS", 1) == 1


@pytest.mark.parametrize("value", ["", "four", "1.5", "-1"])
def test_something_else_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=rf"^the environment variable TASKS is '{value}', not a whole number \(0"):
        whole_number({"TASKS": value}, "TASKS", 1)


@pytest.mark.parametrize(
    ("environ", "line"),
    [
        ({"DEEPSPEED_TIMEOUT": "1h"}, r"DEEPSPEED_TIMEOUT is '1h', not a whole number \(1 to 1000000\); correct it or"),
        ({"DEEPSPEED_TIMEOUT": "0"}, r"DEEPSPEED_TIMEOUT is '0', not a whole number \(1 to 1000000\)"),
        ({"DEEPSPEED_TIMEOUT": "99999999999999"}, r"DEEPSPEED_TIMEOUT is '99999999999999', not"),
        ({"DS_ACCELERATOR": "tpu"}, r"DS_ACCELERATOR is 'tpu'; give cuda or cpu, or unset it"),
    ],
)
def test_what_deepspeed_cannot_read_is_refused(environ: dict[str, str], line: str) -> None:
    with pytest.raises(ConfigError, match=f"^the environment variable {line}"):
        check_for_deepspeed(environ)


def test_what_deepspeed_reads_passes() -> None:
    check_for_deepspeed({})
    check_for_deepspeed({"DEEPSPEED_TIMEOUT": "30", "DS_ACCELERATOR": "cpu"})
