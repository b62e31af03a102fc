"""Compiles Triton kernels that are about to be launched side by side, a core each.

A kernel is compiled at its first launch, for seconds and on one core: one after the other, the
candidates of a tuning take longer to compile than to be timed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_log = logging.getLogger("hydra_kernels")


def compile_launches(launches: Iterable[Callable[[], object]]) -> int:
    """Calls every function, in which kernels that were not compiled yet are not launched, and then
    compiles those, side by side. What a function writes is not to be read.

    Nothing is raised: what does not compile says so when it is launched.

    Returns:
        How many kernels were to be compiled.
    """
    started = time.perf_counter()
    with _not_launched() as found:
        for launch in launches:
            with contextlib.suppress(Exception):
                launch()
    if not found:
        return 0
    import triton

    workers = min(len(found), os.cpu_count() or 1)
    with (
        contextlib.suppress(Exception),
        ThreadPoolExecutor(workers) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
    ):
        for kernel, specialization in found.values():
            with contextlib.suppress(Exception):
                kernel.preload(specialization)
    seconds = time.perf_counter() - started
    _log.info("compiled %d kernels in %.1f s", len(found), seconds)
    return len(found)


@contextlib.contextmanager
def _not_launched() -> Iterator[dict[tuple, tuple[Any, str]]]:
    """Within it this thread's launches of kernels that are not compiled are listed, not done."""
    try:
        from triton import knobs
    except ImportError:  # there is nothing to compile
        yield {}
        return
    found: dict[tuple, tuple[Any, str]] = {}
    thread = threading.get_ident()
    before = knobs.runtime.jit_cache_hook

    def listed(**launch: Any) -> bool:
        if threading.get_ident() != thread:
            return bool(before is not None and before(**launch))
        kernel, asked = launch["fn"].jit_function, launch["compile"]
        found.setdefault((kernel, asked["key"]), (kernel, asked["specialization_data"]))
        return True

    knobs.runtime.jit_cache_hook = listed
    try:
        yield found
    finally:
        knobs.runtime.jit_cache_hook = before
