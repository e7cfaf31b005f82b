"""A shell's TAB, and the script that `--install-completion` writes."""

import os
import subprocess
import sys

import pytest


def vdr(*arguments: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "vdr_cli", *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("vdr sc", "score"),
        ("vdr score --mem", "--members"),
        ("vdr recipes show gs", "gsm8k"),
        ("vdr train --bonus surp", "surprisal"),
    ],
)
def test_words_are_completed(typed: str, offered: str) -> None:
    word = str(len(typed.split()) - 1)
    shown = vdr(_VDR_COMPLETE="complete_bash", COMP_WORDS=typed, COMP_CWORD=word)
    assert shown.split() == [offered]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_names_this_program(shell: str) -> None:
    shown = vdr("--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert f"complete_{shell}" in shown
    assert "vdr" in shown
