"""Where hypothesis is missing its tests are skipped by name, and the others in the file run."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE = """
import importlib.util

import pytest
from hypothesis import HealthCheck, assume, given, settings, strategies as st

shapes = st.tuples(st.integers(1, 3) | st.just(7)).map(list)

@st.composite
def pairs(draw):
    return draw(st.integers())

@pytest.mark.parametrize("backend", ["a", "b"])
@settings(max_examples=3, suppress_health_check=[HealthCheck.too_slow])
@given(shape=shapes, pair=pairs())
def test_property(backend, shape, pair):
    raise AssertionError("cannot run")

@given(st.integers(), st.integers())
def test_positional(tmp_path, a, b):
    raise AssertionError("cannot run")

def test_plain():
    assert importlib.util.find_spec("hypothesis").name == "hypothesis"
"""


def test_the_rest_of_a_file_runs(tmp_path):
    (tmp_path / "test_it.py").write_text(FILE)
    (tmp_path / "conftest.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from tests import no_hypothesis\nno_hypothesis.install()\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider",
         "-p", "no:hypothesispytest", "-c", "/dev/null", "--rootdir", tmp_path, tmp_path],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed, 3 skipped" in done.stdout
    assert "needs hypothesis, which is not installed" in done.stdout
