"""Which test lost the device.

After an illegal access every CUDA call of the process fails, and so would all tests that follow.
So each test is waited for at its end: what it left on the device fails it and not the next. A
worker of xdist ends there, and a new one takes over; without workers, what follows is skipped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator

import pytest


class LostDevice:
    def __init__(self, synchronize: Callable[[], None], in_worker: bool) -> None:
        self.synchronize = synchronize
        self.in_worker = in_worker
        self.lost_in = ""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        if self.lost_in:
            pytest.skip(f"the CUDA context was lost in {self.lost_in}")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, None, None]:
        try:
            yield
        finally:
            if not self.lost_in:
                self.check(item)

    def check(self, item: pytest.Item) -> None:
        try:
            self.synchronize()
        except Exception as error:
            self.lost_in = item.nodeid
            raise RuntimeError(f"this test has lost the CUDA context: {error}") from error

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Generator[None, object, object]:
        done = yield
        if self.lost_in and self.in_worker:
            os._exit(1)  # xdist names the test as the one that crashed, and starts another worker
        return done
