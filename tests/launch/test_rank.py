"""A process reads its rank, and the GPUs that it may use, from the environment."""

from __future__ import annotations

import pytest

from vdr_cli.errors import ConfigError
from vdr_cli.launch.rank import gpu_names, is_first, is_rank, processes_started, speaks_for_host

RANK = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_a_launcher_says_so() -> None:
    assert is_rank(RANK) and not is_first(RANK) and processes_started(RANK) == 2
    assert is_first({**RANK, "RANK": "0"})


def test_one_rank_speaks_for_a_host() -> None:
    assert speaks_for_host({**RANK, "LOCAL_RANK": "0", "LOCAL_SIZE": "8"})
    assert speaks_for_host(RANK), "no launcher has counted it"
    assert not speaks_for_host({**RANK, "LOCAL_SIZE": "8"}) and not speaks_for_host({**RANK, "LOCAL_WORLD_SIZE": "2"})


@pytest.mark.parametrize("left", [{"WORLD_SIZE": "4"}, {"WORLD_SIZE": "many"}, {"RANK": "3"}, {}])
def test_half_of_the_variables_make_no_rank(left: dict[str, str]) -> None:
    assert not is_rank(left) and is_first(left) and processes_started(left) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"WORLD_SIZE": ""}, "has RANK and WORLD_SIZE but no WORLD_SIZE; unset"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not a whole number"),
        ({"RANK": "-1"}, "RANK is '-1', not a whole number"),
        ({"LOCAL_RANK": ""}, "no LOCAL_RANK"),
        ({"MASTER_ADDR": ""}, "no MASTER_ADDR"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http', not a whole number"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT is 65536; a port is 1 to 65535"),
        ({"LOCAL_SIZE": "all"}, "LOCAL_SIZE is 'all', not a whole number"),
        ({"LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE is 'x', not a whole number"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE is 0, and this rank is one"),
        ({"RANK": "2"}, "RANK is 2, not below WORLD_SIZE 2"),
    ],
)
def test_a_variable_that_makes_no_sense_is_named_by_whoever_has_it(wrong: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        processes_started({**RANK, **wrong})
    assert is_first({**RANK, **wrong}), "else nobody would print the error"


@pytest.mark.parametrize(
    ("visible", "names"),
    [("2, 3", ["2", "3"]), ("", []), ("-1", []), ("GPU-8a,MIG-0b", ["GPU-8a", "MIG-0b"])],
)
def test_gpus_are_those_that_the_variable_shows(visible: str, names: list[str]) -> None:
    assert gpu_names(visible) == names
