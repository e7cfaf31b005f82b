"""Every command's options are frozen in options.txt, and those that stand for settings say what the schema says.

python tests/cli/test_options.py          # write options.txt after an option was added, removed or changed on purpose
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType
from typing import get_args, get_origin

import pytest
import typer

from vdr_cli.cli import app, doctor, plan, score, train
from vdr_cli.cli import eval as eval_command
from vdr_cli.cli.options import LAUNCH, Flag, panel, parameter_name, reward_settings
from vdr_cli.config.described import setting

FROZEN = Path(__file__).with_name("options.txt")
ROOT = Path(__file__).resolve().parents[2]
FLAGS = {
    "train": train.FLAGS,
    "eval": eval_command.FLAGS,
    "score": score.FLAGS,
    "plan": plan.FLAGS,
    "doctor": doctor.FLAGS,
}


def commands() -> Iterator[tuple[str, Callable[..., None]]]:
    """Every command and subcommand: its name as typed, and its function."""
    for name, module in app.COMMANDS.items():
        yield name, module.command
        for below, function in getattr(module, "SUBCOMMANDS", {}).items():
            yield f"{name} {below}", function


def options() -> list[str]:
    """A line per argument and option: command, names, type, default, and the setting that it stands for."""
    lines = []
    for command, function in commands():
        flags = {parameter_name(flag.name): flag for flag in FLAGS.get(command, ())}
        for parameter in inspect.signature(function, eval_str=True).parameters.values():
            if parameter.annotation is not typer.Context:
                lines.append(line(command, parameter, flags.get(parameter.name)))
    return lines


def line(command: str, parameter: inspect.Parameter, flag: Flag | None) -> str:
    annotation, info = get_args(parameter.annotation)
    inner = next((one for one in get_args(annotation) if one is not NoneType), annotation)  # of `int | None`
    kind = str(annotation if get_origin(annotation) is list else inner).removeprefix("<class '").removesuffix("'>")
    own = [text for text in (info.default, *(info.param_decls or ())) if isinstance(text, str)]
    names = ",".join(own) or "--" + parameter.name.replace("_", "-")
    names = names if isinstance(info, typer.models.OptionInfo) else parameter.name.upper()
    default = "required" if parameter.default is inspect.Parameter.empty else str(parameter.default)
    if flag is not None and default == "None":
        default = setting(flag.key).default
    return f"{command:<12}  {names:<19}  {kind:<9}  {default:<15}  {flag.key if flag else ''}".rstrip()


def test_options_are_frozen() -> None:
    frozen = FROZEN.read_text(encoding="utf-8").splitlines()
    assert options() == frozen, "changed on purpose? run python tests/cli/test_options.py, and tell CHANGELOG.md"


@pytest.mark.parametrize("name", FLAGS)
def test_help_and_reference_page_say_the_same(name: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Description and default of each option, as a user reads them on either page."""
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setenv("TERMINAL_WIDTH", "1000")
    assert app.run([name, "--help"]) == 0
    shown = capsys.readouterr().out.splitlines()
    sections = re.split(r"^## ", (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    pages = {section.partition("\n")[0]: section for section in sections}
    for flag in FLAGS[name]:
        section, _, key = flag.key.partition(".")
        (row,) = re.findall(rf"^\| `{key}` \| .* \|$", pages[section], re.MULTILINE)
        default, description = row.strip("| ").replace("\\|", "¦").split(" | ")[-2:]
        (said,) = [line for line in shown if re.match(rf"│[ *]+{flag.name} ", line)]
        assert (flag.description or description.replace("¦", "|")) in said
        default = default.strip("`")
        if flag.default is None and not flag.required and default not in ("null", "false", "empty"):
            assert f"[default: {default}]" in said


def test_an_option_is_what_its_setting_is() -> None:
    flag = Flag("--mode", "disagreement.mode", note="More of it.")
    assert flag.help.startswith("Positions at which members are compared")
    assert "More of it. One of none, per_token, end_of_sequence." in flag.help
    assert flag.help.endswith("[dim]\\[default: end_of_sequence][/dim]")
    assert "default" not in Flag("--mode", "disagreement.mode", default="none").help, "Typer shows that one"
    switch = Flag("--no-ssh", "launch.no_ssh").parameter()
    assert switch.annotation.__args__[0] == bool | None and switch.default is None
    (renamed,) = panel(LAUNCH, "launch.master_addr")
    assert (renamed.name, renamed.panel) == ("--master-addr", LAUNCH)


if __name__ == "__main__":
    FROZEN.write_text("\n".join(options()) + "\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("length", {"name": "length"}),
        ("r.py:f=0.5", {"name": "r.py:f", "weight": 0.5}),
        ("runs/lr=0.1/r.py:f", {"name": "runs/lr=0.1/r.py:f"}),
        ("runs/lr=0.1/r.py:f=2", {"name": "runs/lr=0.1/r.py:f", "weight": 2.0}),
    ],
)
def test_a_reward_with_or_without_a_weight(typed: str, wanted: dict[str, object]) -> None:
    assert reward_settings([typed]) == [wanted]
