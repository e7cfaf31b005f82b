"""Errors that a user can fix: one line each, with an exit code.

Raise one of these with a message that says what is wrong, where (key, file, row, host) and what to
do. `cli.app` prints the message alone and exits with `exit_code`; everything else is a bug and
keeps its traceback.
"""


class VdrError(Exception):
    """Base class; never raised itself."""

    exit_code = 1


class ConfigError(VdrError):
    """Something that was typed is wrong: a flag, a config key, a path, an impossible combination."""

    exit_code = 2


class DataError(VdrError):
    """A dataset row, a missing column, or what a reward function did with them."""

    exit_code = 3


class MachineError(VdrError):
    """The machine: no permission, no memory, no host, a missing package."""

    exit_code = 4
