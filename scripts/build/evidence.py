"""The figure of docs/evidence.md and README, from the studies of record in docs/evidence/*/record.

    python scripts/build/evidence.py [--output docs/images/evidence.png] [DIRECTORY ...]

A row per study: pass@k of the control, of disagreement, of a placebo and of the rival with the best endpoint, and
every arm's difference to the control. Bands and bars are 95 % intervals.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vdr_cli.study.analysis import Curve, Row, analysed, curves
from vdr_cli.study.record import Record, read_record

ROOT = Path(__file__).resolve().parents[2]
EVIDENCE = ROOT / "docs" / "evidence"
STUDIES = ("starter", "countdown4", "countdown4-gated", "countdown4-confirm", "routes")
"""In the order of the page."""
NO_RIVALS = ("noise", "permuted", "negative", "plain_more")
"""Placebos, and the control at equal cost."""
OURS = {"end_of_sequence": "#0969da", "per_token_rmi": "#8250df"}
PLACEBOS = ("end_of_sequence_permuted", "per_token_rmi_permuted")
CONTROL, PLACEBO, RIVAL = "#24292f", "#8c959f", "#bc4c00"
GOOD, BAD, OPEN = "#1a7f37", "#cf222e", "#57606a"


def figure(records: list[Record]) -> Figure:
    """The picture of these studies, a row for each bed."""
    beds = [
        (record, bed) for record in records for bed in record.study.beds if record.of(bed, record.study.file.control)
    ]
    made = Figure(figsize=(11, 3.0 * len(beds)), layout="constrained")
    axes = made.subplots(len(beds), 2, squeeze=False, width_ratios=(1.0, 1.15))
    for (record, bed), (left, right) in zip(beds, axes, strict=True):
        rows = analysed(record)[bed][record.study.file.endpoint]
        draw_curves(left, record.title, chosen_curves(record, rows, curves(record, bed)))
        draw_differences(right, record, rows)
    return made


def chosen_curves(record: Record, rows: dict[str, Row], found: dict[str, Curve]) -> list[tuple[str, str, Curve]]:
    """(label, colour, curve) of the arms that the figure shows."""
    control = record.study.file.control
    rivals = {
        arm: row.difference.value
        for arm, row in rows.items()
        if row.difference and row.difference.n and arm not in OURS and not any(word in arm for word in NO_RIVALS)
    }
    placebos = [(arm, PLACEBO) for arm in PLACEBOS if arm in found][:1]
    shown = [(control, CONTROL), *OURS.items(), *placebos]
    if rivals:
        shown.append((max(rivals, key=lambda arm: rivals[arm]), RIVAL))
    return [(arm.replace("_", " "), colour, found[arm]) for arm, colour in shown if arm in found]


def draw_curves(axes: Any, study: str, chosen: list[tuple[str, str, Curve]]) -> None:
    for label, colour, curve in chosen:
        axes.plot(curve.k, curve.mean, color=colour, label=label, linewidth=1.8)
        axes.fill_between(curve.k, curve.low, curve.high, color=colour, alpha=0.13, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(chosen[0][2].k, [str(k) for k in chosen[0][2].k])
    axes.minorticks_off()
    axes.set(title=f"{study}: problems solved by k samples", xlabel="k", ylabel="pass@k")
    axes.legend(frameon=False, loc="center right", bbox_to_anchor=(1.0, 0.41), fontsize="small")
    axes.grid(alpha=0.25)


def draw_differences(axes: Any, record: Record, rows: dict[str, Row]) -> None:
    """Every rival's difference to the control, best at the top, each seed as a point."""
    file = record.study.file
    found = sorted(
        ((arm, row.difference) for arm, row in rows.items() if row.difference and row.difference.n),
        key=lambda pair: pair[1].value,
    )
    axes.axvspan(-file.equivalence, file.equivalence, color="#0969da", alpha=0.07, linewidth=0)
    axes.axvline(0, color="#24292f", linewidth=0.8)
    for place, (_, difference) in enumerate(found):
        word = difference.verdict.partition(",")[0]
        colour = {"better": GOOD, "worse": BAD}.get(word, OPEN)
        seeds = list(difference.seeds.values())
        axes.plot(seeds, [place - 0.22] * len(seeds), ".", color="#8c959f", markersize=3)
        if difference.low == difference.low:
            axes.plot([difference.low, difference.high], [place, place], color=colour, linewidth=2.2)
        axes.plot(difference.value, place, "o", color=colour, markersize=5)
    axes.set_yticks(range(len(found)), [arm.replace("_", " ") for arm, _ in found])
    pairs = max((difference.n for _, difference in found), default=0)
    axes.set(
        title=f"{file.endpoint} less {file.control}'s, {pairs} paired seeds", xlabel=f"difference of {file.endpoint}"
    )
    axes.locator_params(axis="x", nbins=7)
    axes.grid(alpha=0.25, axis="x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "directories",
        nargs="*",
        type=Path,
        default=[path for name in STUDIES if (path := EVIDENCE / name / "record").is_dir()],
    )
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images" / "evidence.png")
    arguments = parser.parse_args()
    made = figure([read_record(path) for path in arguments.directories])
    FigureCanvasAgg(made)
    made.savefig(arguments.output, dpi=110, metadata={"Software": None})
    print(arguments.output)


if __name__ == "__main__":
    main()
