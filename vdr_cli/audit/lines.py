"""A line of the audit: a quantity on file, recomputed, their difference, and whether it is within its bound."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from vdr_cli.system.text import shown_value


class Bound(NamedTuple):
    """Largest difference allowed: absolute + relative · |recomputed|, for every single element."""

    absolute: float
    relative: float = 0.0


BOUNDS: dict[str, dict[str, Bound]] = {
    "float32": {
        "exact": Bound(0.0),
        "reward": Bound(1e-6, 1e-6),
        "advantage": Bound(2e-6, 2e-5),
        "bonus": Bound(2e-6, 2e-5),
        "measure": Bound(2e-6, 1e-3),
        "logp": Bound(5e-5, 1e-5),
        "mean": Bound(1e-6, 1e-5),
        "loss": Bound(2e-6, 1e-4),
        "kl": Bound(1e-6, 1e-3),
        "draw": Bound(1e-5),
        "norm": Bound(1e-7, 5e-4),
        "change": Bound(0.0, 2e-3),
        "weights": Bound(0.0, 1e-6),
        "rate": Bound(0.0, 1e-9),
    },
    "bfloat16": {
        "exact": Bound(0.0),
        "reward": Bound(1e-6, 1e-6),
        "advantage": Bound(2e-6, 2e-5),
        "bonus": Bound(2e-6, 2e-5),
        "measure": Bound(2e-2, 0.5),
        "logp": Bound(0.25, 0.05),
        "mean": Bound(2e-2, 5e-2),
        "loss": Bound(2e-2, 0.1),
        "kl": Bound(1e-2, 0.5),
        "draw": Bound(5e-2),
        "norm": Bound(1e-3, 0.1),
        "change": Bound(0.0, 0.5),
        "weights": Bound(0.0, 1e-2),
        "rate": Bound(0.0, 1e-9),
    },
}
"""By the dtype that the run computed in, then by kind; docs/audit.md says where each comes from."""


@dataclass(frozen=True)
class Line:
    """The finding on one quantity of one step."""

    step: int
    quantity: str
    on_file: float | None = None
    """A number, or the mean of as many as `count` says."""
    recomputed: float | None = None
    difference: float | None = None
    """Largest over the elements."""
    allowed: str = ""
    within: bool | None = None
    """None: not recomputed; `note` says why."""
    count: int = 1
    note: str = ""

    @property
    def verdict(self) -> str:
        return {True: "ok", False: "OUTSIDE", None: "-"}[self.within]

    def named(self, quantity: str) -> Line:
        """The same line under another name."""
        return replace(self, quantity=quantity)

    def as_json(self) -> dict[str, Any]:
        """Plain values; numbers that are not finite become null."""
        values = {**vars(self), "verdict": self.verdict}
        return {
            name: None if isinstance(value, float) and not np.isfinite(value) else value
            for name, value in values.items()
        }


@dataclass(frozen=True)
class Judge:
    """Compares for one step, by the bounds of one dtype."""

    step: int
    dtype: str

    def compare(self, quantity: str, on_file: Any, recomputed: Any, kind: str, note: str = "") -> Line:
        """Numbers or arrays of one shape, element by element. NaN, a reward of None, equals NaN alone."""
        ours, theirs = (np.asarray(value, dtype=np.float64) for value in (recomputed, on_file))
        bound = BOUNDS[self.dtype][kind]
        if ours.shape != theirs.shape:
            shapes = f"{theirs.shape} on file, {ours.shape} recomputed"
            return Line(self.step, quantity, within=False, note=shapes)
        same = (np.isnan(ours) & np.isnan(theirs)) | (ours == theirs)
        with np.errstate(invalid="ignore"):
            difference = np.where(same, 0.0, np.nan_to_num(np.abs(ours - theirs), nan=np.inf))
        allowed = bound.absolute + bound.relative * np.where(same, 0.0, np.abs(ours))
        return Line(
            self.step,
            quantity,
            _mean(theirs),
            _mean(ours),
            float(np.max(difference, initial=0.0)),
            f"{bound.absolute:g} + {bound.relative:g}·|x|" if bound.relative else f"{bound.absolute:g}",
            bool(np.all(difference <= allowed)),
            int(ours.size),
            note,
        )

    def equal(self, quantity: str, on_file: list[Any], recomputed: list[Any]) -> Line:
        """Lists of anything, entry by entry: the numbers shown are how many are equal."""
        wrong = [index for index, pair in enumerate(zip(on_file, recomputed, strict=False)) if pair[0] != pair[1]]
        missing = abs(len(on_file) - len(recomputed))
        note = ""
        if wrong:
            first = wrong[0]
            note = f"first at row {first}: {shown_value(on_file[first], 24)}, not {shown_value(recomputed[first], 24)}"
        right = min(len(on_file), len(recomputed)) - len(wrong)
        return Line(
            self.step,
            quantity,
            float(len(on_file)),
            float(right),
            float(len(wrong) + missing),
            "0",
            not wrong and not missing,
            len(on_file),
            note,
        )

    def skipped(self, quantity: str, why: str) -> Line:
        """A quantity that cannot be recomputed from what there is."""
        return Line(self.step, quantity, note=why)


def _mean(values: Any) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
