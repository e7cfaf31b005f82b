"""Before a run over a hostfile starts: ask every host, in parallel, whether it could take part.

`vdr train --hostfile` refuses to start on the first thing found; `vdr doctor --hostfile` shows everything.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from vdr_cli.config import Config
from vdr_cli.config.paths import looks_like_path
from vdr_cli.config.schema import LaunchConfig
from vdr_cli.errors import MachineError
from vdr_cli.launch import probe
from vdr_cli.launch.arguments import named_checkpoint
from vdr_cli.launch.commands import check_plain
from vdr_cli.launch.environment import DEFAULT_PORT
from vdr_cli.launch.hostfile import LOCAL_NAMES, Hosts

PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "pydantic", "peft")
TIMEOUT = 30.0
MEETING_SECONDS = 8.0
MOST_CLOCK_SECONDS = 10.0
PARALLEL = 64
SHOWN = 8


@dataclass(frozen=True)
class Problem:
    host: str
    what: str
    cure: str

    def line(self) -> str:
        return f"host {self.host}: {self.what}; {self.cure}"


@dataclass(frozen=True)
class Question:
    """The request that every host answers."""

    files: tuple[str, ...] = ()
    """Absolute paths that must be there, the same on every host."""
    shared: tuple[str, ...] = ()
    """Directories that all hosts must share."""
    meeting: Mapping[str, Any] | None = None
    """Address and port where rank 0 will listen."""


@dataclass(frozen=True)
class Answer:
    """A host's facts, or why it gave none."""

    facts: Mapping[str, Any] = field(default_factory=dict)
    silence: str = ""
    seconds: float = 0.0
    clock: float = 0.0
    """Seconds its clock is ahead of ours."""


def check_hosts(launch: LaunchConfig, hosts: Hosts, question: Question) -> None:
    """MachineError naming every host that cannot take part, and the cure. A few seconds."""
    _, problems = examine(launch, hosts, question)
    if problems:
        shown = "; ".join(problem.line() for problem in problems[:SHOWN])
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise MachineError(f"{shown}{more} (full list: vdr doctor --hostfile {launch.hostfile})")


def reachable_hosts(launch: LaunchConfig, hosts: Hosts) -> Hosts:
    """The hosts that answer over ssh, with their slots. In parallel."""
    request = _request(Question(), (), first=False)
    with ThreadPoolExecutor(min(PARALLEL, len(hosts))) as pool:
        silences = pool.map(lambda host: ask(launch, host, request).silence, hosts)
    return {host: hosts[host] for host, silence in zip(hosts, silences, strict=True) if not silence}


def examine(launch: LaunchConfig, hosts: Hosts, question: Question) -> tuple[dict[str, Answer], list[Problem]]:
    """Ask every host in parallel; the answers and everything that is wrong."""
    check_plain(launch, str(Path.cwd()))
    with shared_tokens(question.shared) as tokens, ThreadPoolExecutor(min(PARALLEL, len(hosts))) as pool:
        ours = probe.host_facts(_request(question, tokens, first=False) | {"meeting": None})
        pending = {
            host: pool.submit(ask, launch, host, _request(question, tokens, first=number == 0))
            for number, host in enumerate(hosts)
        }
        answers = {host: answer.result() for host, answer in pending.items()}
    problems = [found for host in hosts for found in compare(host, answers[host], ours, max(hosts[host]) + 1, question)]
    return answers, problems


def question_for(config: Config, hosts: Hosts, arguments: Sequence[str] = ()) -> Question:
    """The question to every host for a run with this configuration, typed with these arguments."""
    named = [config.model.name, config.data.name, config.data.eval_name or "", config.engine.ds_config]
    named += [*map(_file_of, _functions(config)), named_checkpoint(arguments) or ""]
    settings = [word for word in arguments if word.endswith((".yaml", ".yml"))]
    local = [Path(name).expanduser().absolute() for name in named if name and looks_like_path(name)]
    paths = dict.fromkeys([*(Path(name).absolute() for name in settings), *local])
    output = Path(config.train.output or "runs").absolute()
    return Question(tuple(map(str, paths)), (str(output),), meeting_of(config.launch, hosts))


def _functions(config: Config) -> list[str]:
    """Names of functions, classes and reward models of the user's, as they are given."""
    turns, bonus = config.rollout, config.bonus
    own = [bonus.source, bonus.answer or "", turns.environment or "", *turns.tools, turns.tool_parser]
    return [function.name for function in config.rewards.functions] + own


def _file_of(function: str) -> str:
    """The path in file.py:function or model:PATH; empty for one that is built in."""
    return function.removeprefix("model:") if function.startswith("model:") else function.rpartition(":")[0]


def meeting_of(launch: LaunchConfig, hosts: Hosts) -> dict[str, Any] | None:
    """The address of rank 0. Without launch.master_addr the launcher asks the first host; then only the port is
    tried."""
    if len(hosts) < 2:
        return None
    others = len(hosts) - 1 if launch.master_addr else 0
    port = launch.master_port or DEFAULT_PORT
    return {"address": launch.master_addr, "port": port, "others": others, "patience": MEETING_SECONDS}


def ask(launch: LaunchConfig, host: str, request: Mapping[str, Any]) -> Answer:
    """One host's answer, over ssh (or directly when it is this machine)."""
    source = f"REQUEST = {json.dumps(request)!r}\n" + files("vdr_cli.launch").joinpath("probe.py").read_text()
    # A __future__ import must come first in a file.
    source = "from __future__ import annotations\n" + source.replace("from __future__ import annotations\n", "")
    started = time.time()
    try:
        answered = subprocess.run(
            _remote_python(launch, host), input=source, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return Answer(silence=f"did not answer within {TIMEOUT:g} s")
    except FileNotFoundError:
        return Answer(silence="ssh is not installed here")
    ended = time.time()
    marked = [line for line in answered.stdout.splitlines() if line.startswith(probe.MARK)]
    if answered.returncode or not marked:
        said = [line for line in answered.stderr.strip().splitlines() if line.strip()]
        return Answer(silence=said[-1].strip() if said else f"exit code {answered.returncode}")
    facts = json.loads(marked[-1].removeprefix(probe.MARK))
    clock = facts["time"] - min(max(facts["time"], started), ended)
    return Answer(facts, seconds=ended - started, clock=clock)


def compare(host: str, answer: Answer, ours: Mapping[str, Any], slots: int, question: Question) -> list[Problem]:
    """Everything about one host that would make the run fail or differ. slots: up to the highest one used. Pure."""
    if answer.silence:
        return [Problem(host, f"no answer over ssh: {answer.silence}", _ssh_cure(host, answer.silence))]
    facts = answer.facts
    problems = [*_software(host, facts, ours), *_files(host, facts, ours, question), *_network(host, facts, question)]
    gpus = len(facts["accelerators"])
    if 0 < gpus < slots:
        problems.append(Problem(host, f"{slots} slots but {gpus} GPUs", "correct its line in the hostfile"))
    if ours["accelerators"] and not gpus:
        problems.append(Problem(host, "no GPU, unlike this machine", "check its driver (nvidia-smi) or exclude it"))
    if abs(answer.clock) > MOST_CLOCK_SECONDS:
        problems.append(Problem(host, f"its clock differs by {answer.clock:+.0f} s", "start a time service on it"))
    return problems


def _software(host: str, facts: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[Problem]:
    if facts["python"] != ours["python"]:
        cure = f"use the same environment ({sys.executable})"
        yield Problem(host, f"Python {facts['python']}, here {ours['python']}", cure)
    for name, version in ours["packages"].items():
        theirs = facts["packages"].get(name)
        if theirs != version:
            cure = f"install {name}=={version} there" if version else f"remove {name} there or install it here"
            yield Problem(host, f"{name} {theirs or 'is missing'}, here {version or 'none'}", cure)
    if facts["code"] is None:
        yield Problem(host, "vdr_cli cannot be imported", "install it there, or start in a directory that has it")
    elif facts["code"] != ours["code"]:
        yield Problem(host, "another version of vdr_cli", "install the same one, or share the directory")


def _files(host: str, facts: Mapping[str, Any], ours: Mapping[str, Any], question: Question) -> Iterator[Problem]:
    for path in question.files:
        if facts["files"][path] is None:
            yield Problem(host, f"{path} is not there", "copy it, or put it on a shared file system")
        elif facts["files"][path] != ours["files"][path]:
            difference = f"{facts['files'][path]}, here {ours['files'][path]}"
            yield Problem(host, f"{path} differs ({difference})", "copy it again")
    for path, seen in facts["shared"].items():
        if not seen:
            yield Problem(
                host, f"{Path(path).parent} is not the same directory as on this machine", "mount it on every host"
            )


def _network(host: str, facts: Mapping[str, Any], question: Question) -> Iterator[Problem]:
    if question.meeting is None:
        return
    address, port = question.meeting["address"], question.meeting["port"]
    if facts.get("port"):
        yield Problem(host, f"port {port} cannot be used: {facts['port']}", "give another launch.master_port")
    if facts.get("reached"):
        cure = "give launch.master_addr, the first host's address as the others see it, or open the port"
        yield Problem(host, f"cannot reach {address}:{port}, where rank 0 will listen: {facts['reached']}", cure)


def _ssh_cure(host: str, silence: str) -> str:
    lowered = silence.lower()
    if "permission denied" in lowered:
        return f"put this machine's public key into its authorized_keys (ssh-copy-id {host})"
    if "could not resolve" in lowered:
        return "correct the name in the hostfile or add it to /etc/hosts or ~/.ssh/config"
    if "host key verification" in lowered:
        return f"accept its key once: ssh {host}"
    if "no such file or directory" in lowered or "not found" in lowered:
        return f"this directory and {sys.executable} must exist there under the same names"
    return f"try: ssh {host} true, or leave it out with launch.exclude"


def _remote_python(launch: LaunchConfig, host: str) -> list[str]:
    if host in LOCAL_NAMES:
        return [sys.executable, "-"]
    port = ["-p", str(launch.ssh_port)] if launch.ssh_port is not None else []
    options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "PasswordAuthentication=no"]
    return ["ssh", *options, *port, host, f"cd {shlex.quote(str(Path.cwd()))} && {shlex.quote(sys.executable)} -"]


def _request(question: Question, tokens: Sequence[str], first: bool) -> dict[str, Any]:
    return {
        "path": [str(Path.cwd()), *filter(None, os.environ.get("PYTHONPATH", "").split(":"))],
        "packages": PACKAGES,
        "files": question.files,
        "tokens": tokens,
        "disk": question.shared,
        "meeting": question.meeting,
        "first": first,
    }


@contextmanager
def shared_tokens(directories: Sequence[str]) -> Iterator[list[str]]:
    """A file in each directory (or its nearest parent that exists) which hosts that share it can see."""
    tokens = []
    try:
        for directory in directories:
            folder = next(path for path in (Path(directory), *Path(directory).parents) if path.is_dir())
            token = folder / f".vdr-shared-{secrets.token_hex(8)}"
            with contextlib.suppress(OSError):  # a directory that cannot be written is refused elsewhere
                token.touch()
                tokens.append(str(token))
        yield tokens
    finally:
        for name in tokens:
            Path(name).unlink(missing_ok=True)
