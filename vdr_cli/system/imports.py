"""Large libraries, imported in less time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """A block of imports that the garbage collector leaves alone, then and later.

    Modules are never garbage. Searching those of torch and transformers while they are imported takes a fifth of the
    time, and each full collection later half a second; DeepSpeed asks for one whenever it starts an engine.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
