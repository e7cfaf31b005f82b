"""The script that builds the beds' models."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_training_with_members_masks_draws_one_for_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(SCRIPTS / "build"), *sys.path])
    bed = runpy.run_path(str(SCRIPTS / "build" / "bed.py"))
    model = bed["build_model"](bed["PRETRAINING"]["starter"])
    ids = torch.tensor([[2, 3, 4, 5]]).expand(2, -1)
    plain = model(input_ids=ids).logits
    bed["drop"](model, 0.1)
    first, second = model(input_ids=ids).logits
    assert not torch.allclose(first, second)
    with torch.no_grad():  # where the model is measured, nothing is dropped
        torch.testing.assert_close(model(input_ids=ids).logits, plain)
