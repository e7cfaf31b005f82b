"""Ranks noticing that another rank is gone, on whichever host, within a bounded time.

Every rank holds one TCP connection to rank 0. When a process dies the kernel closes its side at once;
when a host or the network goes away the kernel's keepalive probes fail. Either way no Python has to
run on the side that is silent: a rank that computes for minutes without releasing the interpreter
still counts as alive.
"""

from __future__ import annotations

import hmac
import json
import math
import secrets
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vdr_cli.errors import MachineError
from vdr_cli.launch.probe import server

PROBE_SECONDS = 5
MOST_PROBES = 127
"""Linux accepts no more for TCP_KEEPCNT."""
LONGEST_SILENCE = 1e6
"""Seconds (11 days) that Linux can count, in milliseconds and between 127 probes."""
Message = dict[str, Any]


@dataclass(frozen=True)
class Loss:
    """The reason that the run cannot go on: `rank` on `host` is gone, or said `message` before it ended."""

    rank: int
    host: str
    message: str

    def line(self) -> str:
        return f"host {self.host}, rank {self.rank}: {self.message}"


class Peers:
    """The star of connections. `step` handles what has happened and returns a Loss once there is one."""

    def __init__(self, rank: int, world_size: int, timeout: float, address: str, share: Callable[[Any], Any]) -> None:
        """share: rank 0's value to all ranks (a broadcast); called once, on every rank."""
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self.farewell: Loss | None = None
        """The first rank that said why it ends, when one did: the others are expected to follow."""
        self._selector = selectors.DefaultSelector()
        self._who: dict[socket.socket, tuple[int, str]] = {}
        self._left: set[socket.socket] = set()
        self._buffers: dict[socket.socket, bytes] = {}
        if rank == 0:
            self._listen(share)
        else:
            self._connect(address, share)

    def step(self, patience: float) -> Loss | None:
        """Wait at most `patience` seconds for news."""
        for key, _ in self._selector.select(patience):
            loss = self._read(key.fileobj)  # type: ignore[arg-type]
            if loss is not None:
                return loss
        return None

    def leave(self, why: str | None = None) -> None:
        """This rank ends on its own account, so its silence is no fault. why: an error that all ranks should share."""
        self._send_all({"leave": [self.rank, socket.gethostname(), why]})

    def tell(self, loss: Loss) -> None:
        """Pass on why the run cannot go on: from rank 0 to all, from another rank to rank 0."""
        self._send_all({"loss": [loss.rank, loss.host, loss.message]})

    def close(self) -> None:
        self._selector.close()
        for connection in self._who:
            connection.close()

    def _listen(self, share: Callable[[Any], Any]) -> None:
        """Let everybody in; afterwards nobody else."""
        token = secrets.token_hex(16)
        deadline = time.monotonic() + self.timeout
        with server(0, self.world_size) as listener:
            share((listener.getsockname()[1], token))
            while len(self._who) < self.world_size - 1:
                listener.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    missing = sorted({*range(1, self.world_size)} - {rank for rank, _ in self._who.values()})
                    raise MachineError(
                        f"rank {missing[0]} did not reach rank 0 within {self.timeout:g} s; does a firewall block "
                        "ports between the hosts?"
                    ) from None
                self._welcome(connection, token)

    def _connect(self, address: str, share: Callable[[Any], Any]) -> None:
        port, token = share(None)
        try:
            connection = socket.create_connection((address, port), timeout=self.timeout)
            connection.sendall(_line({"token": token, "rank": self.rank, "host": socket.gethostname()}))
        except OSError as error:
            raise MachineError(
                f"rank {self.rank} on {socket.gethostname()} did not reach rank 0 at {address}:{port} ({error}); "
                "does a firewall block ports between the hosts?"
            ) from error
        self._add(connection, 0, address)

    def _welcome(self, connection: socket.socket, token: str) -> None:
        connection.settimeout(2.0)
        try:
            hello = json.loads(_read_line(connection))
            known = hmac.compare_digest(str(hello["token"]), token)
        except (OSError, ValueError, KeyError, TypeError):
            known = False
        if known:
            self._add(connection, int(hello["rank"]), str(hello["host"]))
        else:
            connection.close()

    def _add(self, connection: socket.socket, rank: int, host: str) -> None:
        _keep_alive(connection, self.timeout)
        connection.setblocking(False)
        self._who[connection] = (rank, host)
        self._buffers[connection] = b""
        self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, connection: socket.socket) -> Loss | None:
        rank, host = self._who[connection]
        try:
            data = connection.recv(65536)
            reason = "ended without a word (killed, or out of memory?)"
        except BlockingIOError:
            return None
        except OSError as error:
            data, reason = b"", f"cannot be reached any more ({error.strerror or error})"
        if not data:
            self._selector.unregister(connection)
            return None if connection in self._left else Loss(rank, host, reason)
        *lines, self._buffers[connection] = (self._buffers[connection] + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "loss" in message:
                return Loss(*message["loss"])
            if message["leave"][0] == rank:
                self._left.add(connection)
            if message["leave"][2] is not None and self.farewell is None:
                self.farewell = Loss(*message["leave"])
                if self.rank == 0:
                    self._send_all(message)
        return None

    def _send_all(self, message: Message) -> None:
        for connection in self._who:
            try:
                connection.sendall(_line(message))
            except OSError:
                continue  # that one is gone, which is news for whoever still listens to it


def _keep_alive(connection: socket.socket, timeout: float) -> None:
    """Probes every PROBE_SECONDS of silence, or less often in a long one, and its end after `timeout` seconds."""
    silence = min(timeout, LONGEST_SILENCE)
    interval = max(1, min(PROBE_SECONDS, int(silence / 2)), math.ceil(silence / (MOST_PROBES + 1)))
    probes = max(1, int(silence / interval) - 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, interval)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, probes)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(silence * 1000))


def _line(message: Message) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _read_line(connection: socket.socket) -> bytes:
    """Up to the first newline and no byte further: the next message may be there already."""
    data = b""
    while not data.endswith(b"\n") and len(data) < 4096:
        more = connection.recv(1)
        if not more:
            break
        data += more
    return data
