import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from vdr_cli.data.turns import shown_turns
from vdr_cli.system.text import duration
from vdr_cli.training.live import HISTORY, History, LiveView, Sample, sample_lines, sparkline, step_line

METRICS = {
    "reward": 0.25,
    "frac_reward_zero_std": 0.5,
    "disagreement/mean": 0.0123,
    "completions/mean_length": 12.5,
    "grad_norm": 0.7,
    "step_time": 0.5,
    "tokens_per_second": 500.0,
}
HOSTILE = Sample("p\x1b[2J", ["[red]", "\x1b[31m", "\n"], [0.0, 1.0, 2.0], 1.0)


def console(terminal: bool, width: int = 100, **more: object) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, height=30, **more)  # type: ignore[arg-type]


def written(view: Console) -> str:
    assert isinstance(view.file, io.StringIO)
    return view.file.getvalue()


PRINTS_ON = """
import sys, pathlib
from vdr_cli.training.live import LiveView
view = LiveView("off")
view.start(500)
for step in range(1, 500):
    view.update(step, {"reward": 1.0})
pathlib.Path(sys.argv[1]).write_text("ran to its end")
"""


def test_a_reader_that_goes_away_ends_nothing(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", PRINTS_ON, str(tmp_path / "end")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        running.stdout.close()
        _, errors = running.communicate()
    assert (running.returncode, errors) == (0, "")
    assert (tmp_path / "end").read_text() == "ran to its end"


def test_a_full_disk_under_the_log_ends_nothing() -> None:
    refused = []

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            refused.append(text)
            raise OSError(28, "No space left on device")

    view = LiveView("off", console=Console(file=Full()))
    view.start(2)
    view.update(1, METRICS)
    view.note("still here")
    assert len(refused) >= 2, "both lines were tried"


def test_a_line_a_step_without_a_terminal() -> None:
    out = console(False, width=40)
    with LiveView("auto", console=out) as view:
        view.start(20)
        view.update(1, METRICS)
        view.update(2, METRICS, [HOSTILE])
    lines = written(out).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("step  1/20 | reward 0.250 | zero-variance 0.50 | disagreement 0.0123 | length 12.5")
    assert "tokens/s 500" in lines[1]
    assert "left 0:" in lines[1]
    assert "\x1b" not in written(out)


def test_off_gives_lines_on_a_terminal_too() -> None:
    out = console(True)
    with LiveView("off", console=out) as view:
        view.start(2)
        view.update(1, METRICS)
    assert written(out).count("\n") == 1


@pytest.mark.parametrize("width", [12, 40, 120])
def test_any_width_and_hostile_samples(width: int) -> None:
    out = console(True, width=width, color_system="truecolor")
    with LiveView("auto", console=out) as view:
        view.start(3)
        for step in range(1, 4):
            view.update(step, METRICS | {"kl": float("nan")}, [HOSTILE, HOSTILE])
    text = written(out)
    assert "\x1b[2J" not in text
    assert "\x1b[31m␛" not in text


@pytest.mark.parametrize("width", [40, 120])
def test_every_number_has_its_line_and_completions_keep_their_step(width: int) -> None:
    out = console(True, width=width, color_system=None)
    with LiveView("on", console=out) as view:
        view.start(9)
        view.update(1, METRICS, [HOSTILE])
        view.update(2, METRICS)
        lines = ["".join(part.text for part in line) for line in out.render_lines(view._render(), pad=False)]
    starts = [line.split("  ")[0] for line in lines]
    assert starts[2:9] == ["reward", "zero-variance", "disagreement", "length", "grad norm", "step time", "tokens/s"]
    assert "completions of step 1" in lines


def test_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    out = Console(file=io.StringIO(), force_terminal=True, width=100, color_system="truecolor")
    with LiveView("on", console=out) as view:
        view.start(3)
        view.update(1, METRICS, [HOSTILE])
    assert "\x1b[48" not in written(out)
    assert "\x1b[3" not in written(out).replace("\x1b[3m", "")


def test_markup_in_a_completion_is_text() -> None:
    prompt, line = sample_lines([HOSTILE], rows=10)
    assert prompt.plain == "p␛[2J"
    assert line.plain == "+1.00 [red]␛[31m␊"


def test_history_is_bounded_and_keeps_the_course() -> None:
    history = History()
    for step in range(10_000):
        history.add(step)
    assert len(history.points) <= HISTORY
    assert history.points == sorted(history.points)
    assert history.points[0] < 100
    assert history.points[-1] > 9_800


def test_sparkline() -> None:
    assert sparkline([], 5) == ""
    assert sparkline([1, 1, 1], 5) == "▁▁▁"
    assert sparkline([0, 7], 5) == "▁█"
    assert len(sparkline(list(range(1000)), 20)) == 20


def test_step_line_shows_only_what_was_measured() -> None:
    assert step_line(3, 10, {"reward": 1.0}, None, 2**20).plain == "step  3/10 | reward 1.000 | 1 MiB"


def test_duration() -> None:
    assert duration(3725.9) == "1:02:05"


def test_an_exception_ends_the_view_and_passes() -> None:
    out = console(True)
    with pytest.raises(KeyboardInterrupt), LiveView("on", console=out) as view:
        view.start(3)
        raise KeyboardInterrupt
    assert written(out).endswith(("\x1b[?25h", "\n\x1b[?25h")) or "\x1b[?25h" in written(out)


def test_an_episode_shows_roles_and_the_environments_words_without_colour() -> None:
    """The policy's tokens carry the colours; what the tool says is text that cannot command the terminal."""
    messages = [
        {"role": "assistant", "content": "ab"},
        {"role": "tool", "content": "[red]\x1b[31mwarm"},
        {"role": "assistant", "content": "c"},
    ]
    own = [True, True, False, False, True]
    tokens = ["a", "b", "<tool>", "warm", "c"]
    sample = Sample("p", tokens, [0.0, 9.0, 0.0, 0.0, 1.0], 1.0, shown_turns(messages, own))
    line = sample_lines([sample], rows=5)[1]
    assert "[assistant] ab [tool] [red]" in line.plain and line.plain.rstrip().endswith("[assistant] c")
    assert "<tool>" not in line.plain and "\x1b" not in line.plain
    coloured = [line.plain[span.start : span.end] for span in line.spans if str(span.style).startswith("on ")]
    assert coloured == ["b", "c"]


def test_turns_without_a_stretch_of_tokens_each_are_shown_as_text() -> None:
    messages = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "?"}]
    assert [turn.tokens for turn in shown_turns(messages, [True, False, True])] == [None, None]
    assert shown_turns(messages[:1], [True]) == [] and shown_turns("text", [True]) == []
    called = shown_turns([{"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}], [True])
    assert called[0].text == "{'name': 'look'}" and called[0].tokens == range(0, 1)
