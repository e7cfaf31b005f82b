"""`vdr recipes`: complete configurations to read, copy and change."""

from __future__ import annotations

from typing import Annotated

import typer

from vdr_cli import recipes
from vdr_cli.errors import ConfigError, MachineError

EXAMPLES = (
    "vdr recipes list",
    "vdr recipes show gsm8k",
    "vdr recipes copy gsm8k mine.yaml",
)


def _complete(incomplete: str) -> list[str]:
    return [name for name in recipes.ALL if name.startswith(incomplete)]


Name = Annotated[str, typer.Argument(metavar="NAME", help="See vdr recipes list.", autocompletion=_complete)]


def command(context: typer.Context) -> None:
    """Complete, commented configurations: list them, show one, copy one and change it."""
    if context.invoked_subcommand is None:
        show_list()


def show_list() -> None:
    """List the recipes, one per line."""
    width = max(map(len, recipes.ALL))
    for name in recipes.ALL:
        typer.echo(f"{name:<{width}}  {recipes.summary(name)}")


def show(name: Name) -> None:
    """Print a recipe."""
    typer.echo(recipes.recipe_text(name), nl=False)


def copy(
    name: Name, path: Annotated[str | None, typer.Argument(metavar="PATH", help="Default: NAME.yaml here.")] = None
) -> None:
    """Write a recipe to a new file. An existing file is never overwritten."""
    from vdr_cli.config.paths import checked_path

    text = recipes.recipe_text(name)
    target = checked_path(path or f"{name}.yaml", "PATH")
    if target.is_dir():
        target = target / f"{name}.yaml"
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{target} already exists; give another PATH") from None
    except FileNotFoundError:
        raise ConfigError(f"{target}: no directory {target.parent}; make it first") from None
    except OSError as error:
        raise MachineError(f"{target}: cannot be written ({error.strerror})") from None
    start = f"vdr {'study' if name in recipes.STUDIES else 'train'} {target}"
    typer.echo(f"{target}: change it, look at the plan with {start} --dry-run, start with {start}")


SUBCOMMANDS = {"list": show_list, "show": show, "copy": copy}
