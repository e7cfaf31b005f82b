"""A rank without torch: RANK SIZE PORT WHAT, where WHAT is what goes wrong in it."""

import os
import signal
import socket
import sys
import time

from vdr_cli.errors import DataError
from vdr_cli.launch import watchdog

rank, size, port, what = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(True))
if what == "early":  # a pool that ends at once may end a worker that has hardly begun
    os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGTERM))


def share(value):  # a broadcast over a socket of its own
    if rank == 0:
        with socket.create_server(("127.0.0.1", port)) as server:
            for _ in range(size - 1):
                connection, _ = server.accept()
                connection.sendall(repr(value).encode())
                connection.close()
        return value
    for _ in range(200):
        try:
            with socket.create_connection(("127.0.0.1", port)) as connection:
                return eval(connection.makefile().read())
        except OSError:
            time.sleep(0.05)
    raise TimeoutError("rank 0 does not listen")


watchdog.begin(os.environ.get("VDR_RUN_DIRECTORY"), timeout=2.0)
watchdog.phase("reward")
with watchdog.connected(rank, size, share):
    if what == "long":
        watchdog.note_step(1000.0)
    print("ready", flush=True)
    if what == "long":  # its step ends, and is saved, after more than the timeout
        while not told:
            time.sleep(0.05)
        time.sleep(5)
        sys.exit(0)
    if rank == 1 and what == "bug":
        raise KeyError("answer")
    if rank == 1 and what == "error":
        raise DataError("row 7")
    if rank == 1 and what == "end":
        sys.exit(0)
    if rank == 1 and what == "fork":  # as a reward function does, in a thread; the copy outlives its parent
        from threading import Thread

        Thread(target=lambda: os.fork() or time.sleep(45) or os._exit(0)).start()
    if what == "pool":
        import multiprocessing
        from multiprocessing.pool import ThreadPool

        def use_a_pool():
            with multiprocessing.get_context("fork").Pool(2) as pool:  # ends its workers with SIGTERM
                return pool.map(abs, [-1, -2])

        with ThreadPool(1) as threads:
            print(threads.apply(use_a_pool), flush=True)
        time.sleep(3)
        sys.exit(0)
    if what == "early":
        child = os.fork() or os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        time.sleep(3)
        sys.exit(0)
    time.sleep(3 if what == "end" else 30)
