"""The figures of README and docs/evidence.md, from the studies of record in docs/evidence/*/record.

    python scripts/build/evidence.py [--output docs/images] [DIRECTORY ...]

evidence.png has a panel for each study that compares disagreement, or the best rival that keeps pass@1, with its
placebo: pass@k at the end, of the control, of disagreement, of that rival and of the placebo; or, where the endpoint
is no pass@k, the endpoint of these arms. differences.png has every arm's difference from the control, in every study.
Bands and bars are 95 % intervals.
"""

from __future__ import annotations

import argparse
from math import ceil
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vdr_cli.study.analysis import Row, analysed, best_first, curves, start_value
from vdr_cli.study.record import Record, read_record

ROOT = Path(__file__).resolve().parents[2]
EVIDENCE = ROOT / "docs" / "evidence"
STUDIES = {
    "starter": "starter",
    "countdown4": "countdown4",
    "routes": "routes",
    "routes-dose": "routes, weight, gate, schedule and form",
    "routes-confirm": "routes, the commands recommended",
    "countdown4-gated": "countdown4, no bonus for failed groups",
    "countdown4-dose": "countdown4, weight and members",
    "countdown4-settings": "countdown4, gate, schedule and scale",
    "starter-further": "starter, further sources",
    "countdown4-further": "countdown4, further sources",
    "countdown4-novelty": "countdown4, novelty again",
    "countdown4-reuse": "countdown4, four updates, block C",
    "countdown4-confirm": "countdown4, four updates per rollout",
    "countdown4-surprisal": "countdown4, four updates, surprisal again",
    "starter-surprisal": "starter, four updates, surprisal again",
}
"""Directory to title, in the order of the page."""
NO_RIVALS = ("noise", "permuted", "negative", "plain_more")
"""Placebos, and the control at equal cost."""
OURS = {"end_of_sequence": "#0969da", "per_token_rmi": "#8250df"}
PLACEBO_OF = "{}_permuted"
CONTROL, PLACEBO, RIVAL, START = "#24292f", "#8c959f", "#bc4c00", "#afb8c1"
GOOD, BAD, OPEN = "#1a7f37", "#cf222e", "#57606a"
LEGEND = {
    "start": START,
    "plain GRPO": CONTROL,
    **OURS,
    "a placebo": PLACEBO,
    "best rival": RIVAL,
}
PANELS_IN_A_ROW = 4
MOST_LOST = 0.01
"""pass@1 that a rival may lose, by the preregistration."""


def ends(records: dict[str, Record]) -> Figure:
    """A panel per study, by its title: the values at the end of the arms that matter."""
    rows = ceil(len(records) / PANELS_IN_A_ROW)
    made = Figure(figsize=(3.9 * PANELS_IN_A_ROW, 3.1 * rows), layout="constrained")
    panels = list(made.subplots(rows, PANELS_IN_A_ROW, squeeze=False).flat)
    for (title, record), axes in zip(records.items(), panels, strict=False):
        draw = draw_curves if record.study.file.endpoint.startswith("pass@") else draw_endpoint
        draw(axes, record)
        rival = [arm for arm, colour in chosen(record).items() if colour == RIVAL]
        axes.set_title(f"{title}\nbest rival: {rival[0]}" if rival else title, fontsize="medium")
        axes.grid(alpha=0.25)
    for axes in panels[len(records) :]:
        axes.set_axis_off()
    lines = [
        Line2D([], [], color=colour, label=name, linestyle=":" if name == "start" else "-", linewidth=2.2)
        for name, colour in LEGEND.items()
    ]
    made.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False)
    return made


def differences(records: dict[str, Record]) -> Figure:
    """A panel per study, by its title: every arm's difference from the control."""
    arms = [len(record.study.arms) for record in records.values()]
    made = Figure(figsize=(9, 0.24 * sum(arms) + 1.0 * len(arms)), layout="constrained")
    panels = made.subplots(len(records), 1, squeeze=False, height_ratios=arms).flat
    for (title, record), axes in zip(records.items(), panels, strict=True):
        draw_differences(axes, record, title)
    return made


def bed_of(record: Record) -> str:
    """The study's only bed."""
    (bed,) = record.study.beds
    return bed


def chosen(record: Record) -> dict[str, str]:
    """Arm to colour: the arms that the figure shows, the starting model under the empty name."""
    numbers = analysed(record)[bed_of(record)]
    rows, once = numbers[record.study.file.endpoint], numbers["pass@1"]
    rivals = {
        arm: row.difference.value
        for arm, row in rows.items()
        if row.difference and row.difference.n and arm not in OURS and not any(word in arm for word in NO_RIVALS)
        if (price := once[arm].difference) and price.value > -MOST_LOST
    }
    best = [max(rivals, key=lambda arm: rivals[arm])] if rivals else []
    placebos = [placebo for arm in (*OURS, *best) if (placebo := PLACEBO_OF.format(arm)) in rows][:1]
    colours = {"": START, record.study.file.control: CONTROL} | OURS
    colours |= dict.fromkeys(placebos, PLACEBO) | dict.fromkeys(best, RIVAL)
    return {arm: colour for arm, colour in colours.items() if arm in rows or not arm}


def is_compared(record: Record) -> bool:
    """True when the study has a placebo of an arm that is shown."""
    return PLACEBO in chosen(record).values()


def draw_curves(axes: Any, record: Record) -> None:
    found = curves(record, bed_of(record))
    ks = found[record.study.file.control].k
    for arm, colour in chosen(record).items():
        if arm in found:
            curve, shown = found[arm], len(ks)
            style = {"color": colour, "label": arm or "start", "linestyle": "-" if arm else ":"}
            axes.plot(curve.k[:shown], curve.mean[:shown], **style, linewidth=1.8)
            axes.fill_between(curve.k[:shown], curve.low[:shown], curve.high[:shown], color=colour, alpha=0.13, lw=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks[::2], [str(k) for k in ks[::2]])
    axes.minorticks_off()
    axes.set(xlabel="k", ylabel="pass@k", ylim=(0, 1.02))


def draw_endpoint(axes: Any, record: Record) -> None:
    """A dot per arm, the start at the top where it has the number; bars: the paired difference from the control."""
    endpoint, bed = record.study.file.endpoint, bed_of(record)
    rows: dict[str, Row] = analysed(record)[bed][endpoint]
    control = rows[record.study.file.control].mean
    start = start_value(record, bed, endpoint)
    shown = [(arm, colour) for arm, colour in chosen(record).items() if arm or start is not None][::-1]
    for place, (arm, colour) in enumerate(shown):
        row = rows.get(arm)
        axes.plot(row.mean if row else start, place, "o", color=colour)
        if row and row.difference:
            bar = (control + row.difference.low, control + row.difference.high)
            axes.plot(bar, [place, place], color=colour, linewidth=2.2)
    axes.axvline(control, color=CONTROL, linewidth=0.8)
    names = {"": "start"} | {arm: "a placebo" for arm, colour in shown if colour == PLACEBO}
    axes.set_yticks(range(len(shown)), [names.get(arm, arm) for arm, _ in shown])
    axes.set(xlabel=f"{endpoint} per problem", ylim=(-0.6, len(shown) - 0.4))


def draw_differences(axes: Any, record: Record, title: str) -> None:
    """Every rival's difference from the control, best at the top, each seed as a point."""
    file = record.study.file
    rows = analysed(record)[bed_of(record)][file.endpoint]
    measured = {arm: row.difference for arm, row in rows.items() if row.difference and row.difference.n}
    found = best_first(measured, record.study.lower_is_better)[::-1]
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
    axes.set_yticks(range(len(found)), [arm for arm, _ in found])
    pairs = max((difference.n for _, difference in found), default=0)
    axes.set(
        title=f"{title}: {file.endpoint} minus {file.control}'s, {pairs} paired seeds",
        xlabel=f"difference of {file.endpoint}",
    )
    axes.locator_params(axis="x", nbins=7)
    axes.grid(alpha=0.25, axis="x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    published = [path for name in STUDIES if (path := EVIDENCE / name / "record").is_dir()]
    parser.add_argument("directories", nargs="*", type=Path, default=published)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images")
    arguments = parser.parse_args()
    found = {path: read_record(path) for path in arguments.directories}
    records = {STUDIES.get(path.parent.name, record.title): record for path, record in found.items()}
    compared = {title: record for title, record in records.items() if is_compared(record)} or records
    for name, made in (("evidence", ends(compared)), ("differences", differences(records))):
        FigureCanvasAgg(made)
        made.savefig(arguments.output / f"{name}.png", dpi=110, metadata={"Software": None})
        print(arguments.output / f"{name}.png")


if __name__ == "__main__":
    main()
