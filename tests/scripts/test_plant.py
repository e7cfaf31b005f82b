"""The planted faults keep up with the code."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "verify"))

from faults import FAULTS
from plant import misplaced


def test_every_fault_can_be_planted() -> None:
    assert misplaced(FAULTS) == []


def test_a_fault_whose_text_is_gone_is_named() -> None:
    gone = FAULTS[0]._replace(old="no such line anywhere")
    absent = FAULTS[1]._replace(file="vdr_cli/no_such_file.py")
    assert [line.partition(": ")[0] for line in misplaced([gone, FAULTS[2], absent])] == [gone.name, absent.name]
