"""The tests of ``tests/ops``, with backend "cuda" in the place of the backends they have here."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.cuda_on_cpu import device

OPS = Path(__file__).parents[1] / "ops"


def module(name: str) -> ModuleType:
    """The module anew: what it parametrizes over are the backends of the moment."""
    spec = importlib.util.spec_from_file_location(
        f"tests.cuda_on_cpu.of_{name}", OPS / f"{name}.py"
    )
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    with device.installed(None):
        spec.loader.exec_module(made)
    return made


def _values(mark) -> Iterator:
    """The values of a parametrize mark with "cuda" as their backend."""
    names = mark.args[0]
    names = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)
    for value in mark.args[1]:
        plain = value.values if hasattr(value, "values") and not isinstance(value, dict) else value
        one = plain if len(names) > 1 or plain is not value else (plain,)
        if one[names.index("backend")] == "cuda":
            yield value


def tests_of(name: str) -> dict[str, Callable]:
    """Those that take a backend."""
    found = {}
    for key, test in vars(module(name)).items():
        if not key.startswith("test_"):
            continue
        marks, takes = [], False
        for mark in getattr(test, "pytestmark", []):
            if mark.name == "parametrize" and "backend" in str(mark.args[0]):
                takes = True
                values = list(_values(mark))
                mark = pytest.mark.parametrize(mark.args[0], values, **mark.kwargs).mark
                takes = bool(values)
            marks.append(mark)
        if takes:
            test.pytestmark = marks
            found[f"{key}__{name.removeprefix('test_')}"] = test
    return found


def adopt(namespace: dict, *names: str) -> None:
    for name in names:
        namespace.update(tests_of(name))
