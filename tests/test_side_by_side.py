"""Kernels that are compiled together before they are launched."""

import json
import os
import subprocess
import sys

import pytest

from hydra_kernels.backends.triton import side_by_side

pytest.importorskip("triton", reason="needs Triton, which exists for Linux on x86-64")

KERNEL = """
import triton
import triton.language as tl

@triton.jit
def scale_kernel(x, out, n, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, FACTOR * tl.load(x + at, mask=at < n), mask=at < n)
"""

# Triton's own compiler for a Hopper GPU, which is not there: to launch is an error.
PROGRAM = """
import itertools, json, threading
import torch, triton
from triton.backends.compiler import GPUTarget
from hydra_kernels.backends.triton.side_by_side import compile_launches
from scale import scale_kernel

class Driver:
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def __getattr__(self, name): raise RuntimeError("launched")

triton.runtime.driver.set_active(Driver())
x = torch.zeros(100)
launches = [
    lambda block=block, factor=factor: scale_kernel[(1,)](x, x, 100, FACTOR=factor, BLOCK=block)
    for block in (64, 128, 256) for factor in (0.5, None)
]
compiled, turns, together = [], itertools.count(), threading.Barrier(2, timeout=60)
really = triton.compiler.compile

def compile(source, **options):
    compiled.append([source.constants[(4,)], source.constants[(3,)]])
    if next(turns) < 2:  # the first two wait for each other
        together.wait()
    return really(source, **options)

triton.compiler.compile = compile
said = []
count = compile_launches([*launches, launches[0], lambda: 1 / 0])
for launch in launches:
    try:
        launch()
    except Exception as error:
        said.append(str(error))
found = dict(count=count, compiled=compiled, said=said, hook=triton.knobs.runtime.jit_cache_hook)
print(json.dumps(found))
"""


def test_a_launch_finds_its_kernel_compiled(tmp_path):
    """Each once, the first two at the same time; those that do not compile (None times a number)
    say so when they are launched, and nothing is launched before."""
    (tmp_path / "scale.py").write_text(KERNEL)
    paths = os.pathsep.join([os.getcwd(), str(tmp_path)])
    env = {**os.environ, "PYTHONPATH": paths, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    env.pop("TRITON_INTERPRET", None)
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["count"] == 6 and found["hook"] is None
    # A kernel that was not compiled together with the others would be here a second time.
    assert sorted(c for c in found["compiled"] if c[1]) == [[64, 0.5], [128, 0.5], [256, 0.5]], (
        found
    )
    assert [said == "launched" for said in found["said"]] == [True, False] * 3, found["said"]


def test_what_needs_no_kernel_is_run():
    ran = []
    assert side_by_side.compile_launches([lambda: ran.append(1), lambda: ran.append(2)]) == 0
    assert ran == [1, 2]
