"""Other tools' flags lead to flags and settings that exist."""

from __future__ import annotations

import re

from vdr_cli.cli import train
from vdr_cli.cli.trl_flags import NAMES, with_hint
from vdr_cli.config.load import load_config


def test_every_hint_names_a_flag_or_a_setting_of_train() -> None:
    flags = {flag.name for flag in train.FLAGS} | {"--set", "--reward", "--resume"}
    for ours in NAMES.values():
        assert ours.split()[0] in flags, ours
        if found := re.search(r"--set (?P<key>[\w.]+)=", ours):
            section, *rest = found["key"].split(".")
            field = type(getattr(load_config(None, []), section)).model_fields[rest[0]]
            assert field is not None


def test_other_messages_stay_as_they_are() -> None:
    for message in ("No such option: --stepz", "Missing argument 'MODEL'", "No such command 'num_generations'"):
        assert with_hint(message) == message


def test_a_setting_by_another_tools_name() -> None:
    """Letters alone would suggest num_iterations, which is another quantity."""
    said = "--set: grpo.num_generations is not a setting"
    assert with_hint(f"{said}; did you mean grpo.num_iterations?") == f"{said}; did you mean --group-size?"
    other = "--set: grpo.bet_a is not a setting; did you mean grpo.beta?"
    assert with_hint(other) == other
