"""Checkpoints: complete or absent.

A checkpoint is written to a hidden directory, every rank's success is agreed on, every file's size and
SHA-256 go into a manifest, everything is fsynced, and one rename makes it appear as step_<n>. So a
directory with that name is complete unless a disk lies, and the manifest finds that out.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from vdr_cli.engine import collectives
from vdr_cli.engine.engine import Engine
from vdr_cli.engine.reference import WEIGHTS
from vdr_cli.errors import ConfigError, MachineError
from vdr_cli.system.files import sync, sync_tree

MANIFEST = "manifest.json"
STATE = "state.json"
ENGINE_TAG = "engine"
UNIVERSAL_TAG = "universal"
LATEST_UNIVERSAL = "latest_universal"  # DeepSpeed's converter leaves it beside what it made
_STEP = re.compile(r"step_(\d+)")
_PARTIAL, _ASIDE = ".partial_", ".aside_"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    state: dict[str, Any]
    """Contents of state.json: step, prompt position, bonus statistics, world size."""


def save(
    engine: Engine,
    folder: Path,
    step: int,
    state: dict[str, Any],
    also: Sequence[Callable[[Path], None]] = (),
) -> Path:
    """Write folder/step_<step>. Collective. also: each writes more into the directory that it is given, on every rank.

    Raises MachineError on every rank when any rank could not write; what was there before is intact.
    """
    final = folder / f"step_{step:06d}"
    partial = folder / f"{_PARTIAL}{final.name}"
    main = collectives.is_main()
    with _written(folder):
        if main:
            _fresh_directory(partial)
    try:
        with _written(folder):
            _write_rank(engine, partial, step, state)
        for write in also:
            with _written(folder):
                write(partial)
        with _written(folder):
            digests = _digests(partial)
        files = {name: digest for part in collectives.gather_objects(digests) for name, digest in part.items()}
        with _written(folder):
            if main:
                _publish(partial, final, files)
    except MachineError:
        if main:  # what was written so far may be what fills the disk
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def prune(folder: Path, keep_last: int, keep: Path | None = None) -> None:
    """Remove all but the newest keep_last checkpoints (and `keep`), and what was set aside. Rank 0; never fails."""
    if collectives.is_main():
        for path in [*_newest_first(folder)[keep_last:], *folder.glob(f"{_ASIDE}*")]:
            if path != keep:
                shutil.rmtree(path, ignore_errors=True)


def set_aside(folder: Path, after: int) -> None:
    """Hide checkpoints of later steps: the run goes on from `after`, and must not be resumed from what it was before.

    They go when the next one is complete. Rank 0; never fails.
    """
    if collectives.is_main():
        for path in _newest_first(folder):
            if _step_of(path) > after:
                with suppress(OSError):
                    _hide(path)


def newest_complete(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose manifest holds, and a line for each one that was passed over. Collective."""
    passed_over: list[str] = []
    for path in collectives.broadcast_object(_newest_first(folder) if collectives.is_main() else None):
        fault = _agreed_fault(path)
        if fault is None:
            return _opened(path), passed_over
        passed_over.append(f"checkpoint {path} passed over: {fault}")
    return None, passed_over


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at this path. Raises ConfigError naming what is torn. Collective."""
    fault = _agreed_fault(path)
    if fault:
        raise ConfigError(f"--resume {path}: {fault}; give another checkpoint, or auto for the newest complete one")
    return _opened(path)


def find_fault(path: Path, contents: bool = True) -> str | None:
    """The reason that this is no complete checkpoint, naming the file; None when it is. contents: read every byte."""
    try:
        listed = json.loads((path / MANIFEST).read_text())["files"]
        extra = sorted(filter(_is_read, _files_in(path).keys() - listed.keys()))
        if extra:
            return f"{extra[0]} is not in {MANIFEST}"
        for name, (size, digest) in listed.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes, not {size}"
            if contents and _sha256(file) != digest:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return None


def _agreed_fault(path: Path) -> str | None:
    """`find_fault` on all ranks: rank 0 checks names and sizes, every rank the contents of its share. Collective."""
    found = find_fault(path, contents=False) if collectives.is_main() else None
    fault: str | None = collectives.broadcast_object(found)
    return fault or next(filter(None, collectives.gather_objects(_damage(path))), None)


def _damage(path: Path) -> str | None:
    """The first file of this rank's share that is not what was written.

    One that this rank does not see is passed over: the hosts do not share the directory, which `load` says.
    """
    try:
        listed = json.loads((path / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return None
    for name, (_, digest) in list(listed.items())[collectives.rank() :: collectives.world_size()]:
        try:
            if _sha256(path / name) != digest:
                return f"{name} does not match its checksum"
        except FileNotFoundError:
            continue
        except OSError as error:
            return f"{name} cannot be read ({error})"
    return None


def _opened(path: Path) -> Checkpoint:
    """Collective: a rank that does not see the directory goes on until `load` says so."""
    with collectives.agreed():
        state = json.loads((path / STATE).read_text()) if collectives.is_main() else None
    return Checkpoint(path, collectives.broadcast_object(state))


def needs_conversion(checkpoint: Checkpoint | None) -> bool:
    """True when another number of processes wrote it, so that every shard is cut differently."""
    return checkpoint is not None and checkpoint.state["world_size"] != collectives.world_size()


def load(engine: Engine, checkpoint: Checkpoint) -> None:
    """Weights, optimizer and this rank's random states, bit for bit. Collective.

    A checkpoint of another number of processes goes through DeepSpeed's universal format, and the engine
    must have been built for that (`build_engine(universal=True)`). Random states are of ranks, so only
    those of ranks that existed are restored; ours depend on none of them.
    """
    folder, tag = checkpoint.path, ENGINE_TAG
    # Where its shard is missing DeepSpeed only warns, and goes on with other weights or without the moments.
    with collectives.agreed():
        _check_same_files(folder)
    if needs_conversion(checkpoint):
        tag = UNIVERSAL_TAG
        with _written(folder.parent):
            if collectives.is_main():
                _convert(folder)
    engine.ds_engine.load_checkpoint(
        str(folder),
        tag=tag,
        load_module_strict=not engine.has_frozen,
        load_optimizer_states=True,
        load_lr_scheduler_states=False,
    )
    collectives.barrier()
    if collectives.is_main():
        shutil.rmtree(folder / UNIVERSAL_TAG, ignore_errors=True)
        with suppress(OSError):  # somebody else's checkpoint, or a read-only disk
            (folder / LATEST_UNIVERSAL).unlink(missing_ok=True)
    own = checkpoint.path / f"rank_{collectives.rank():05d}.pt"
    if own.is_file():
        _set_random_states(torch.load(own, weights_only=False))


def _check_same_files(folder: Path) -> None:
    """Rank 0 has read every byte; the other ranks, perhaps on other hosts, must have the same files."""
    fault = find_fault(folder, contents=False)
    if fault:
        raise MachineError(
            f"checkpoint {folder} on host {socket.gethostname()}: {fault}; all hosts must share the directory"
        )


def _convert(folder: Path) -> None:
    """DeepSpeed's own converter, as its documentation runs it."""
    shutil.rmtree(folder / UNIVERSAL_TAG, ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    paths = ["--input_folder", str(folder / ENGINE_TAG), "--output_folder", str(folder / UNIVERSAL_TAG)]
    ended = subprocess.run([*command, *paths], capture_output=True, text=True, check=False)
    if ended.returncode:
        reason = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        raise MachineError(
            f"checkpoint {folder} could not be converted to {collectives.world_size()} processes: {reason}"
        )


def _write_rank(engine: Engine, partial: Path, step: int, state: dict[str, Any]) -> None:
    with _failures_kept(engine.ds_engine) as failures:
        # Frozen weights (the base under adapters) are loaded from model.name again.
        engine.ds_engine.save_checkpoint(
            str(partial), tag=ENGINE_TAG, save_latest=False, exclude_frozen_parameters=engine.has_frozen
        )
    if failures:
        raise failures[0]
    torch.save(_random_states(), partial / f"rank_{collectives.rank():05d}.pt")
    if collectives.is_main():
        full = {"step": step, "world_size": collectives.world_size(), "zero_stage": engine.stage, **state}
        (partial / STATE).write_text(json.dumps(full))


@contextmanager
def _failures_kept(ds_engine: Any) -> Iterator[list[Exception]]:
    """A rank that cannot write its file still takes part in the collectives that DeepSpeed makes around it."""
    failures: list[Exception] = []

    def kept(write: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                return write(*args, **kwargs)
            except (OSError, RuntimeError) as fault:
                failures.append(fault)

        return guarded

    writer, script = ds_engine.checkpoint_engine.save, ds_engine._copy_recovery_script
    ds_engine.checkpoint_engine.save, ds_engine._copy_recovery_script = kept(writer), kept(script)
    try:
        yield failures
    finally:
        ds_engine.checkpoint_engine.save, ds_engine._copy_recovery_script = writer, script


def _files_in(path: Path) -> dict[str, Path]:
    """Every file of a checkpoint by its name in it, without the manifest and what a conversion left.

    Hidden files are not ours: file managers and NFS leave some.
    """
    found = [file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.startswith(".")]
    files = {str(file.relative_to(path)): file for file in found}
    own = {MANIFEST, LATEST_UNIVERSAL}
    return {name: file for name, file in files.items() if name not in own and not name.startswith(f"{UNIVERSAL_TAG}/")}


def _digests(partial: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of this rank's share of the files; sharing them out keeps large models quick."""
    names = list(_files_in(partial).items())[collectives.rank() :: collectives.world_size()]
    return {name: (file.stat().st_size, _sha256(file)) for name, file in names}


def _is_read(name: str) -> bool:
    """True for a name under which loading would take a file; what else a user puts beside them is no fault."""
    return name.startswith(f"{ENGINE_TAG}/") or name.endswith(".pt") or name in (STATE, WEIGHTS)


def _publish(partial: Path, final: Path, digests: dict[str, tuple[int, str]]) -> None:
    (partial / MANIFEST).write_text(json.dumps({"files": digests}))
    sync_tree(partial)
    if final.exists():  # the same step again
        _hide(final)
    partial.replace(final)
    sync(final.parent)


@contextmanager
def _written(folder: Path) -> Iterator[None]:
    """A block that writes: a failure on any rank is a MachineError on all. Collective on exit."""
    with collectives.agreed():
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as fault:  # torch.save reports a full disk as RuntimeError
            raise MachineError(
                f"checkpoint under {folder} could not be written: {_reason(fault, folder)}; the one before is intact"
            ) from fault


def _reason(fault: Exception, folder: Path) -> str:
    """The fault and the free space: torch says `unexpected pos` when a disk is full."""
    said = " ".join(str(fault).split())
    with suppress(OSError):
        said += f" ({shutil.disk_usage(folder).free >> 20} MiB free on the disk)"
    return said


def _newest_first(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step_*") if _STEP.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _hide(path: Path) -> None:
    hidden = path.with_name(f"{_ASIDE}{path.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    path.replace(hidden)


def _fresh_directory(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f"{_PARTIAL}*"):
        shutil.rmtree(stale)
    path.mkdir()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _random_states() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"torch": torch.get_rng_state(), "cuda": cuda, "numpy": np.random.get_state(), "python": random.getstate()}


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
