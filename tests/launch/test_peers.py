"""Ranks as threads of one process: each has its own end of the star."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Queue
from typing import Any

import pytest

from vdr_cli.errors import MachineError
from vdr_cli.launch.peers import Loss, Peers


@contextmanager
def star(world_size: int, timeout: float = 10.0, address: str = "127.0.0.1") -> Iterator[list[Peers]]:
    boxes: list[Queue[Any]] = [Queue() for _ in range(world_size)]

    def share(rank: int) -> Any:
        def from_rank_0(value: Any) -> Any:
            if rank == 0:
                for box in boxes:
                    box.put(value)
            return boxes[rank].get(timeout=5)

        return from_rank_0

    peers: list[Any] = [None] * world_size

    def join(rank: int) -> None:
        peers[rank] = Peers(rank, world_size, timeout, address, share(rank))

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    try:
        yield peers
    finally:
        for peer in peers:
            peer.close()


def news(peers: Peers) -> Loss | None:
    """The news that reaches one rank within two seconds."""
    for _ in range(4):
        loss = peers.step(0.5)
        if loss is not None:
            return loss
    return None


def test_a_rank_that_dies_is_named_to_all() -> None:
    with star(3) as (first, second, third):
        second.close()
        loss = news(first)
        assert loss is not None
        assert (loss.rank, loss.host) == (1, socket.gethostname())
        first.tell(loss)
        assert news(third) == loss


def test_rank_0_dying_is_noticed() -> None:
    with star(2) as (first, second):
        first.close()
        loss = news(second)
        assert loss is not None
        assert loss.rank == 0


def test_any_fault_timeout_can_be_set() -> None:
    with star(2, 1e9) as (_, second):
        (connection,) = second._who
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1_000_000_000  # ms, 11 days


def addresses() -> list[str]:
    """Those of this machine over which ranks can meet."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return ["127.0.0.1"]
    return ["127.0.0.1", "::1"]


@pytest.mark.parametrize("address", addresses())
def test_ranks_meet_over_either_protocol(address: str) -> None:
    with star(2, address=address) as (first, second):
        second.leave("over")
        assert first.step(0.5) is None and first.farewell is not None


def test_ranks_meet_on_a_machine_without_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    with star(2) as (first, _):
        (connection,) = first._who
        assert connection.family == socket.AF_INET


def test_a_rank_that_leaves_is_no_loss() -> None:
    with star(2) as (first, second):
        second.leave()
        second.close()
        assert first.step(0.5) is None
        assert first.step(0.5) is None
        assert first.farewell is None


def test_an_error_that_a_rank_leaves_with_reaches_all() -> None:
    with star(3) as (first, second, third):
        second.leave("the disk is full")
        assert first.step(0.5) is None
        assert third.step(0.5) is None
        for peers in (first, third):
            assert peers.farewell == Loss(1, socket.gethostname(), "the disk is full")


def test_a_stranger_is_not_let_in() -> None:
    ports: Queue[Any] = Queue()

    def intrude() -> None:
        port, token = ports.get(timeout=5)
        for guess in ("guess", token):
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(b'{"token": "%s", "rank": 1, "host": "x"}\n' % guess.encode())

    thread = threading.Thread(target=intrude)
    thread.start()
    first = Peers(0, 2, 5.0, "127.0.0.1", ports.put)
    thread.join()
    assert [who for who, _ in first._who.values()] == [1]
    first.close()


def test_a_rank_that_never_comes_is_named() -> None:
    with pytest.raises(MachineError, match=r"rank 1 did not reach rank 0 within 0\.2 s"):
        Peers(0, 2, 0.2, "127.0.0.1", lambda value: value)


def test_a_rank_that_cannot_come_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(MachineError, match=rf"rank 1 on .* did not reach rank 0 at 127\.0\.0\.1:{port} .*refused"):
        Peers(1, 2, 2.0, "127.0.0.1", lambda _: (port, "token"))


@pytest.mark.parametrize("timeout", [2.0, 10.0, 60.0, 600.0, 643.0, 3600.0, 1e6])
def test_silence_is_noticed_within_the_timeout(timeout: float) -> None:
    with star(2, timeout) as (_, second):
        (connection,) = second._who
        idle = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
        interval = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL)
        probes = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT)
        assert timeout / 2 <= idle + interval * probes <= timeout
