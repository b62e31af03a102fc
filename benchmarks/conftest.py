"""``pytest benchmarks/ --benchmark-only``: options of the rows that pytest-benchmark times."""

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hydra benchmarks")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    group.addoption("--bench-device", choices=("cpu", "cuda"), default=default)
    group.addoption("--bench-all", action="store_true", help="every shape, not only the quick ones")
