"""A bonus that does nothing, or more than the task, says so in the log: once, with the cause."""

import pytest

from vdr_cli.exploration.watch import EVIDENCE

FLAT, LARGE = "has not differed within any group", "has been larger than the task advantage"


@pytest.mark.parametrize(
    ("settings", "said", "cause"),
    [
        ({"train.steps": 3, "disagreement.dropout": 1e-12}, FLAT, "disagreement.dropout is 1e-12"),
        ({"train.steps": 22, "bonus.weight": 50.0}, LARGE, "bonus.weight is too large"),
        ({"train.steps": 3}, None, ""),
    ],
)
def test_said_once_with_the_cause(train, tmp_path, settings, said, cause) -> None:
    ended = train(tmp_path / "run", settings=settings)
    assert ended.returncode == 0, ended.stderr
    words = " ".join((ended.stdout + ended.stderr).split())
    assert [words.count(line) for line in (FLAT, LARGE)] == [int(line == said) for line in (FLAT, LARGE)]
    assert cause in words
    assert words.count(EVIDENCE) == 1
