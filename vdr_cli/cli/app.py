"""The `vdr` command: subcommands, exit codes, and errors as one line on stderr.

A command is a file with a function; COMMANDS names it. Nothing here or there imports torch at import time.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import typer.core

from vdr_cli import __version__
from vdr_cli.cli import audit, doctor, plan, recipes, report, score, study, train
from vdr_cli.cli import eval as eval_command
from vdr_cli.cli.trl_flags import with_hint
from vdr_cli.errors import MachineError, VdrError
from vdr_cli.launch.rank import is_first, speaks_for_host
from vdr_cli.system.processes import end_process
from vdr_cli.system.text import shortened, visible

COMMANDS: dict[str, Any] = {
    "train": train,
    "eval": eval_command,
    "score": score,
    "report": report,
    "study": study,
    "audit": audit,
    "doctor": doctor,
    "plan": plan,
    "recipes": recipes,
}
"""Name to module; each has `command` (the function), EXAMPLES (lines of its help) and perhaps SUBCOMMANDS."""

INTERRUPTED = 130
USAGE = 2
REFUSED_FILES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space and run it again"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "get the permission, or choose another place"),
    errno.ENAMETOOLONG: "give a shorter path",
}
"""Errors of the file system, and what to do."""
LONGEST_SHOWN = 200  # characters of a path in such an error

HEAD_START = 5.0
"""Seconds in which a host's first rank prints an error and ends, and its launcher ends the ranks beside it."""

LOCAL_RANK = re.compile(r"^--local[-_]rank(=.*)?$")


def build_app() -> typer.Typer:
    """The Typer application with every command."""
    app = typer.Typer(
        name="vdr",
        add_completion=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name, module in COMMANDS.items():
        if hasattr(module, "SUBCOMMANDS"):
            app.add_typer(_group(module), name=name, epilog=examples(module.EXAMPLES))
        else:
            app.command(name, epilog=examples(module.EXAMPLES))(module.command)
    return app


def _group(module: Any) -> typer.Typer:
    """A command with subcommands; `command` is what it does without one, and what DEFAULT names."""
    if hasattr(module, "DEFAULT"):
        group = typer.Typer(rich_markup_mode="rich", cls=_defaulting(module.DEFAULT), help=module.command.__doc__)
        group.command(module.DEFAULT)(module.command)
    else:
        group = typer.Typer(rich_markup_mode="rich")
        group.callback(invoke_without_command=True)(module.command)
    for name, function in module.SUBCOMMANDS.items():
        group.command(name)(function)
    return group


def _defaulting(default: str) -> type[typer.core.TyperGroup]:
    """A group whose first word may be left out: `vdr study FILE` is `vdr study run FILE`."""

    class Group(typer.core.TyperGroup):
        def parse_args(self, context: Any, args: list[str]) -> list[str]:
            named = bool(args) and args[0] in (*self.commands, *context.help_option_names)
            return super().parse_args(context, args if named else [default, *args])

    return Group


def examples(lines: Sequence[str]) -> str:
    """The end of a help page: an example a line, brackets kept from being read as markup."""
    shown = "\n\n".join("  " + line.replace("[", r"\[") for line in lines)
    return f"[bold]Examples[/bold]\n\n{shown}"


def without_local_rank(arguments: Sequence[str]) -> list[str]:
    """The arguments without --local_rank=N, which the deepspeed launcher puts before the subcommand.

    The two-word form takes its number with it; LOCAL_RANK in the environment says the same.
    """
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip and argument.isdigit():
            skip = False
            continue
        found = LOCAL_RANK.match(argument)
        skip = bool(found) and "=" not in argument
        if not found:
            kept.append(argument)
    return kept


def run(arguments: Sequence[str]) -> int:
    """Run one command line (without the program's name); the exit code."""
    given = without_local_rank(arguments) or ["--help"]
    try:
        _check_directory()
        result = build_app()(args=given, prog_name="vdr", standalone_mode=False, obj=tuple(given))
    except VdrError as error:
        _say(error, with_hint(str(error)))
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, OSError) and error.errno in REFUSED_FILES:
            file = shortened(str(error.filename or "output"), LONGEST_SHOWN)
            _say(error, f"{file}: {error.strerror}; {REFUSED_FILES[error.errno]}")
            return MachineError.exit_code
        # click's own usage errors; Typer may carry its own copy of click, so they are known by what they can do.
        if not hasattr(error, "format_message"):
            raise
        _say(error, with_hint(error.format_message()))
        return int(getattr(error, "exit_code", USAGE))
    return result if isinstance(result, int) else 0


def main() -> NoReturn:
    """The console script."""
    print_what_the_terminal_lacks_as_escapes()
    code = run(sys.argv[1:])
    if "RANK" in os.environ:
        leave(code)
    sys.exit(code)


def print_what_the_terminal_lacks_as_escapes() -> None:
    """In a locale that is not UTF-8 a Greek letter is printed as \\u03bb, where it would end the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def leave(code: int) -> NoReturn:
    """End a rank at once: everything is written and closed, and the interpreter's own end is no safe place.

    While threads of gloo live it aborts now and then ("terminate called without an active exception"), and a
    run that had finished counts as failed.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    end_process(code)


def _check_directory() -> None:
    """Raise MachineError in a shell whose directory was deleted: no relative path leads anywhere."""
    try:
        Path.cwd()
    except FileNotFoundError:
        raise MachineError("the working directory is not there any more; cd to one that is") from None


def _say(error: Exception, message: str) -> None:
    """The one line, from rank 0. As long as ranks have not met, also from others: rank 0 cannot know of their errors.

    A host's first rank has probably met the same, so those beside it wait until their launcher ends them for it.
    """
    text = " ".join(line.strip() for line in message.splitlines())
    with contextlib.suppress(OSError, ValueError):  # a full disk, or a closed stream: the exit code is the same
        if os.environ.get("VDR_TRACEBACK") == "1":
            traceback.print_exception(error)
        if not is_first():
            if _ranks_have_met():
                return
            text = f"host {socket.gethostname()}, rank {os.environ['RANK']}: {text}"
            if not speaks_for_host():
                time.sleep(HEAD_START)
        print(f"vdr: error: {visible(text)}", file=sys.stderr, flush=True)


def _ranks_have_met() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_initialized()


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"vdr {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """GRPO fine-tuning on DeepSpeed ZeRO-3, with a bonus for completions on which dropout members disagree."""
