"""A pytest plugin for the tests on a GPU: what is known of them survives whatever ends the run.

Each event is a line of $GPU_CHECK_RECORD as soon as it is known, and a failure is printed then:
pytest itself tells of both at its end, which a hung device or the part's limit may prevent. Every
test function comes once on each backend before any comes with its next parameters, so that time
that is short is spent on the widest look.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

MAX_SAID = 6000  # characters of one failure in the log


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # xdist's workers report to the process that writes
        config.pluginmanager.register(Record(Path(os.environ["GPU_CHECK_RECORD"])))


@pytest.hookimpl(trylast=True)  # after -m has chosen
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    turns: Counter[tuple[str, str]] = Counter()
    turn: dict[pytest.Item, int] = {}
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        function = (item.nodeid.partition("[")[0], str(params.get("backend")))
        turn[item] = turns[function]
        turns[function] += 1
    items.sort(key=lambda item: turn[item])


class Record:
    def __init__(self, path: Path) -> None:
        self.file = path.open("w")
        self.collected = False

    def write(self, **event: object) -> None:
        self.file.write(json.dumps(event) + "\n")
        self.file.flush()

    def collection(self, count: int) -> None:
        if count and not self.collected:
            self.collected = True
            self.write(collected=count)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.collection(len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self.collection(len(ids))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed(report)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write(started=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed(report)
        elif report.skipped:
            why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            self.write(test=report.nodeid, outcome="skipped", said=str(why)[:300])
        elif report.when == "call":
            self.write(test=report.nodeid, outcome="passed", seconds=round(report.duration, 3))

    def failed(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        text = report.longreprtext
        crash = getattr(report.longrepr, "reprcrash", None)
        lines = (crash.message if crash else text).strip().splitlines() or [""]
        said = lines[0 if crash else -1][:300]
        when = report.when or ""
        self.write(test=report.nodeid, outcome="failed", when=when, said=said)
        print(f"\nFAILED {report.nodeid} ({when})\n{text[-MAX_SAID:]}", flush=True)
