"""The facts that one host reports about itself. Sent over ssh as source text, so it needs nothing but Python itself.

Reads a JSON request from the variable REQUEST (put before this text by preflight.py), prints one JSON line.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

MARK = "vdr-probe:"


def host_facts(request: dict) -> dict:
    """Facts about this host, in the words of the request."""
    return {
        "hostname": socket.gethostname(),
        "python": sys.version.split()[0],
        "packages": {name: version(name) for name in request["packages"]},
        "code": code_digest(),
        "files": {path: describe(path) for path in request["files"]},
        "shared": {path: Path(path).is_file() for path in request["tokens"]},
        "cores": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "accelerators": accelerators(),
        "disk": {path: free_bytes(path) for path in request["disk"]},
        "time": time.time(),
        **rendezvous(request),
    }


def version(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def code_digest() -> str | None:
    """A hash of the vdr_cli that a rank would import here; None when there is none."""
    import importlib.util

    spec = importlib.util.find_spec("vdr_cli")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0])
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def describe(path: str) -> str | None:
    """Size and digest of a file, the number of names in a directory, None when nothing is there."""
    if Path(path).is_dir():
        return f"directory of {len(list(Path(path).iterdir()))}"
    try:
        with Path(path).open("rb") as file:
            # Data files may be huge: their size and both ends tell copies apart.
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
            return f"{size} bytes, {digest.hexdigest()[:12]}"
    except OSError:
        return None


def accelerators() -> list:
    """`name, MiB` of each GPU."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return answer.stdout.strip().splitlines() if answer.returncode == 0 else []


def free_bytes(path: str) -> int | None:
    """Room on the disk of a directory, or of the nearest parent that exists."""
    for folder in [Path(path), *Path(path).parents]:
        if folder.is_dir():
            return shutil.disk_usage(folder).free
    return None


def rendezvous(request: dict) -> dict:
    """Try rank 0's port: it must be free on the first host, and reachable from the others."""
    meeting = request["meeting"]
    if meeting is None:
        return {}
    if request["first"]:
        return listen(meeting)
    return {"reached": reach(meeting)} if meeting["others"] else {}


def listen(meeting: dict) -> dict:
    deadline = time.time() + meeting["patience"]
    came = 0
    try:
        with server(meeting["port"], 1024) as listener:
            while came < meeting["others"] and time.time() < deadline:
                listener.settimeout(max(0.01, deadline - time.time()))
                try:
                    listener.accept()[0].close()
                    came += 1
                except OSError:
                    break
    except OSError as error:
        return {"port": error.strerror or str(error)}
    return {"port": None}


def server(port: int, backlog: int) -> socket.socket:
    """A listening socket on every address of this host: IPv4, and IPv6 where there is one. port: 0 is any free one."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)
    return socket.create_server(("", port), backlog=backlog)


def reach(meeting: dict) -> str | None:
    """None when it was reached; otherwise why not."""
    deadline = time.time() + meeting["patience"]
    while True:
        try:
            with socket.create_connection((meeting["address"], meeting["port"]), timeout=2):
                return None
        except OSError as error:
            if time.time() > deadline:
                return error.strerror or str(error)
        time.sleep(0.1)


if __name__ == "__main__":
    request = json.loads(globals()["REQUEST"])
    sys.path[:0] = request["path"]
    print(MARK + json.dumps(host_facts(request)), flush=True)
