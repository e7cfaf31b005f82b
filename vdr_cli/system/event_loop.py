"""One event loop for a user's async functions, on a thread of its own.

Rewards, environments and tools share it, so that a client or a lock which one of them makes works in the others.
"""

from __future__ import annotations

import asyncio
import threading
from functools import cache


@cache
def event_loop() -> asyncio.AbstractEventLoop:
    """The loop, for the life of the process."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="async functions", daemon=True).start()
    return loop


def leave_event_loop() -> None:
    """Later calls get a new loop: this one may be blocked."""
    event_loop.cache_clear()
