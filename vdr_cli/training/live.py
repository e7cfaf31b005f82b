"""The display of `vdr train`: a live view on a terminal, one line per step elsewhere.

The view keeps a bounded history (a run of any length costs the same memory) and redraws at most twice a second.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

import psutil
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vdr_cli.data.turns import ShownTurn
from vdr_cli.system.text import duration, shortened, visible

REFRESHES_PER_SECOND = 2
HISTORY = 256
SPARK_WIDTH = 24
COMPLETION_CHARACTERS = 600
_BARS = "▁▂▃▄▅▆▇█"
_HEAT = ("", "on grey19", "on dark_goldenrod", "on dark_orange3", "on red3")

# label, metric names (the first that was measured counts), format
SHOWN: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("reward", ("reward",), "{:.3f}"),
    ("zero-variance", ("frac_reward_zero_std",), "{:.2f}"),
    ("disagreement", ("disagreement/mean",), "{:.4f}"),
    ("bonus source", ("bonus/mean",), "{:.4f}"),
    ("length", ("completions/mean_length",), "{:.1f}"),
    ("truncated", ("completions/clipped_ratio",), "{:.2f}"),
    ("kl", ("kl",), "{:.4f}"),
    ("entropy", ("entropy",), "{:.3f}"),
    ("grad norm", ("grad_norm",), "{:.3f}"),
    ("step time", ("step_time",), "{:.2f} s"),
    ("tokens/s", ("tokens_per_second",), "{:,.0f}"),
    ("pass@1", ("eval/pass@1",), "{:.3f}"),
)


@dataclass(frozen=True)
class Sample:
    """One completion to show. tokens and disagreement have the same length."""

    prompt: str
    tokens: Sequence[str]
    disagreement: Sequence[float]
    reward: float
    turns: Sequence[ShownTurn] = ()
    """The messages of an episode; none: the completion is one answer."""


class History:
    """The whole course of one metric in at most HISTORY points: when full, neighbours are averaged."""

    def __init__(self) -> None:
        self.points: list[float] = []
        self._stride = 1
        self._pending: list[float] = []

    def add(self, value: float) -> None:
        self._pending.append(value)
        if len(self._pending) < self._stride:
            return
        self.points.append(sum(self._pending) / len(self._pending))
        self._pending.clear()
        if len(self.points) >= HISTORY:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [(left + right) / 2 for left, right in pairs]
            self._stride *= 2


class RunConsole(Console):
    """A console whose reader may go (`vdr train | head`): the run goes on unseen."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class LiveView:
    """Context manager. Call start once, update after every step, note for a line of text."""

    def __init__(self, live: Literal["auto", "on", "off"] = "auto", console: Console | None = None) -> None:
        self.console = console or RunConsole(highlight=False)
        self._is_live = live == "on" or (live == "auto" and self.console.is_terminal)
        self._live: Live | None = None
        self._histories: dict[str, History] = {}
        self._samples: Sequence[Sample] = ()
        self._sampled = 0  # the step that they are from
        self._metrics: Mapping[str, float] = {}
        self._step = self._total = self._first = 0
        self._started = self._updated = time.monotonic()

    def __enter__(self) -> LiveView:
        if self._is_live:
            self._live = Live(
                get_renderable=self._render,
                console=self.console,
                refresh_per_second=REFRESHES_PER_SECOND,
                vertical_overflow="crop",
                redirect_stdout=True,
                redirect_stderr=True,
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def start(self, total_steps: int, done: int = 0) -> None:
        """The clock starts: `done` steps lie behind (a resumed run), `total_steps` is where the run ends."""
        self._total, self._step, self._first = total_steps, done, done
        self._started = self._updated = time.monotonic()

    def update(self, step: int, metrics: Mapping[str, float], samples: Sequence[Sample] | None = None) -> None:
        """Show the numbers of `step` (steps done, counted from 1) and, when given, one group's completions."""
        self._step, self._metrics, self._updated = step, metrics, time.monotonic()
        if samples:
            self._samples, self._sampled = samples, step
        if self._live is None:
            self._print(step_line(step, self._total, metrics, self._left(), memory_bytes()))
            return
        for label, names, _ in SHOWN:
            value = _first_of(metrics, names)
            if value is not None and value == value:
                self._histories.setdefault(label, History()).add(value)

    def note(self, text: str) -> None:
        """A line of text, above the live view."""
        self._print(Text(visible(text)))

    def _print(self, line: Text) -> None:
        """Print, ignoring errors: a full disk must not end the run."""
        with suppress(OSError):
            self.console.print(line, soft_wrap=True)

    def _left(self) -> float | None:
        done = self._step - self._first
        return (self._updated - self._started) / done * (self._total - self._step) if done > 0 else None

    def _render(self) -> RenderableType:
        width = self.console.width
        bar = Table.grid()  # a bare bar ends without a newline and hides what follows it
        bar.add_row(ProgressBar(max(self._total, 1), self._step, width=width))
        parts: list[RenderableType] = [self._heading(), bar]
        parts.append(self._numbers(sparks=width >= 60))
        if self._samples:
            parts.append(Text(f"completions of step {self._sampled}", style="dim"))
            parts.extend(sample_lines(self._samples, rows=max(self.console.height - 17, 1)))
        return Group(*parts)

    def _heading(self) -> Text:
        left = self._left()
        if left is not None:
            left = max(left - (time.monotonic() - self._updated), 0.0)
        elapsed = duration(time.monotonic() - self._started)
        parts = [f"vdr train  step {self._step}/{self._total}", f"{elapsed} elapsed"]
        parts += [f"{duration(left)} left"] if left is not None else []
        return Text(" · ".join([*parts, memory_text(memory_bytes())]), style="bold", no_wrap=True, overflow="ellipsis")

    def _numbers(self, sparks: bool) -> Table:
        table = Table.grid(padding=(0, 2))
        for label, names, form in SHOWN:
            value = _first_of(self._metrics, names)
            if value is None and label not in self._histories:
                continue
            history = self._histories.get(label)
            text = form.format(value) if value is not None else form.format(history.points[-1] if history else 0.0)
            row = [Text(label, style="dim"), Text(text, justify="right")]
            if sparks:
                row.append(Text(sparkline(history.points if history else [], SPARK_WIDTH), style="cyan"))
            table.add_row(*row)
        return table


def step_line(step: int, total: int, metrics: Mapping[str, float], left: float | None, memory: int) -> Text:
    """One step in one line: `step 12/500 | reward 0.312 | zero-variance 0.25 | ... | left 0:09:12`."""
    parts = [f"step {step:>{len(str(total))}}/{total}"]
    for label, names, form in SHOWN:
        value = _first_of(metrics, names)
        if value is not None:
            parts.append(f"{label} {form.format(value)}")
    parts.append(memory_text(memory))
    parts += [f"left {duration(left)}"] if left is not None else []
    return Text(" | ".join(parts))


def sparkline(points: Sequence[float], width: int) -> str:
    """The points as at most `width` bars; a flat course is drawn low."""
    if not points:
        return ""
    count = min(width, len(points))
    edges = [index * len(points) // count for index in range(count + 1)]
    means = [sum(points[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


def sample_lines(samples: Sequence[Sample], rows: int) -> list[Text]:
    """A prompt and its completions, each token on a background that tells its disagreement within the group."""
    lines = [Text(shortened(visible(samples[0].prompt), 200), style="dim", no_wrap=True, overflow="ellipsis")]
    levels = _heat_levels([value for sample in samples for value in sample.disagreement])
    for sample in samples[: max(rows - 1, 1)]:
        line = Text(f"{sample.reward:+.2f} ", no_wrap=True, overflow="ellipsis")
        _append_tokens(line, sample, levels)
        lines.append(line)
    return lines


def _append_tokens(line: Text, sample: Sample, levels: Sequence[float]) -> None:
    """The completion, up to COMPLETION_CHARACTERS; an episode's messages with their roles, the environment's plain."""
    parts: list[tuple[str, str]] = []
    for turn in sample.turns or (None,):
        if turn is not None:
            parts.append((f"[{turn.role}] ", "dim"))
        if turn is not None and turn.tokens is None:
            parts += [(f"{turn.text} ", "italic")]
            continue
        places = range(len(sample.tokens)) if turn is None or turn.tokens is None else turn.tokens
        parts += [(sample.tokens[at], _HEAT[sum(sample.disagreement[at] > level for level in levels)]) for at in places]
        parts += [] if turn is None else [(" ", "")]
    length = 0
    for text, style in parts:
        line.append(visible(text), style=style)
        length += len(text)
        if length > COMPLETION_CHARACTERS:
            line.append("…")
            return


def _heat_levels(values: Sequence[float]) -> list[float]:
    """Quantiles 50, 75, 90 and 97 %: most tokens stay plain."""
    ordered = sorted(value for value in values if value == value)
    if not ordered:
        return []
    return [ordered[min(int(share * len(ordered)), len(ordered) - 1)] for share in (0.5, 0.75, 0.9, 0.97)]


def memory_bytes() -> int:
    """Peak memory of the accelerator when there is one, else what this process holds now."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return int(psutil.Process().memory_info().rss)


def memory_text(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _first_of(metrics: Mapping[str, float], names: Sequence[str]) -> float | None:
    return next((metrics[name] for name in names if name in metrics), None)
