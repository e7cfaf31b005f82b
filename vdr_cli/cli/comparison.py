"""The tables of `vdr eval`: a column per model, on the terminal and in Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def show(records: Sequence[Mapping[str, Any]], differences: Sequence[Mapping[str, Any]]) -> None:
    """The numbers, a column a model; below, each pair's difference over the same prompts."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    first = records[0]
    named = [{**row, "model": f"{row['model']} - {row['minus']}"} for row in differences]
    _show_table(console, f"{first['prompts']} prompts x {first['samples']} completions", records)
    if named:
        _show_table(console, "Differences over the same prompts", named)
    if any(name.endswith("_low") for name in first):
        console.print("\\[low, high]: 95 % interval over prompts", style="italic")
    if (by := first.get("distinct_by", "text")) != "text":
        console.print(Text(f"distinct_solved counts each {by} once"), style="italic")


def as_markdown(records: Sequence[Mapping[str, Any]], differences: Sequence[Mapping[str, Any]]) -> str:
    """The two tables of the terminal, a column a model."""
    named = [{**row, "model": f"{row['model']} - {row['minus']}"} for row in differences]
    return "\n".join(_markdown_table(rows) for rows in (records, named) if rows)


def _markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    header = ["", *(str(row["model"]).replace("|", "\\|") for row in rows)]
    lines = [header, ["---", *("---:" for _ in rows)]]
    lines += [[name, *(_cell(row, name) for row in rows)] for name in _shown_names(rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _show_table(console: Any, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A column a model; where they do not fit beside each other, a block a model. Text of the user is never markup."""
    from rich.text import Text

    names = _shown_names(rows)
    widths = [max(map(len, names)), *(max(len(_cell(row, name)) for name in names) for row in rows)]
    console.print(Text(title, style="bold"))
    if sum(widths) + 3 * len(widths) + 1 <= console.width:
        console.print(_table(rows))
        return
    for row in rows:
        console.print(Text(str(row["model"]), style="bold"))
        console.print(_block(row))


def _table(rows: Sequence[Mapping[str, Any]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table()
    table.add_column()
    for row in rows:
        table.add_column(Text(str(row["model"])), justify="right", overflow="fold")
    for name in _shown_names(rows):
        table.add_row(Text(name), *(Text(_cell(row, name), no_wrap=True) for row in rows))
    return table


def _block(row: Mapping[str, Any]) -> Any:
    """One model's numbers, in as few columns of the terminal as they take."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1), pad_edge=True)
    table.add_column(overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    for name in _shown_names([row]):
        table.add_row(Text(name), Text(_cell(row, name)))
    return table


def _shown_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    hidden = {"model", "minus", "prompts", "samples", "distinct_by"}
    return [name for name in rows[0] if name not in hidden and not name.endswith(("_low", "_high"))]


def _cell(row: Mapping[str, Any], name: str) -> str:
    """`value [low, high]` where there is an interval."""
    value = row.get(name)
    if not isinstance(value, int | float):
        return "" if value is None else str(value)
    low, high = row.get(f"{name}_low", math.nan), row.get(f"{name}_high", math.nan)
    if math.isnan(low):
        return _number(value)
    return f"{_number(value)} [{_number(low)}, {_number(high)}]"


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) >= 10 else f"{value:.3f}"
