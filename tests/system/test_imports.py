"""Imports without garbage collection: on again afterwards, and what was imported is never searched."""

from __future__ import annotations

import gc

import pytest

from vdr_cli.system.imports import importing


@pytest.fixture(autouse=True)
def as_before():
    yield
    gc.enable()


def test_what_a_block_makes_is_kept_from_the_collector() -> None:
    frozen = gc.get_freeze_count()
    with importing():
        assert not gc.isenabled()
        made = [[number] for number in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= frozen + len(made)


def test_a_failed_import_turns_the_collector_on_again() -> None:
    with pytest.raises(ModuleNotFoundError), importing():
        import no_such_module  # type: ignore[import-not-found]  # noqa: F401
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    with importing():
        pass
    assert not gc.isenabled()
