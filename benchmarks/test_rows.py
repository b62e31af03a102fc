"""The rows of ``python -m benchmarks`` under pytest-benchmark, one test a row.

pytest-benchmark times row after row rather than in turns and knows no device time, so the figures
to publish are those of ``python -m benchmarks``; these are for watching one change at a time.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import harness


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = metafunc.config.getoption("--bench-device")
    quick = not metafunc.config.getoption("--bench-all")
    cases = []
    for name in harness.names():
        for bench in harness.load(name):
            if hasattr(bench, "run"):
                continue  # end to end: takes minutes and times itself
            for shape in harness.shapes_of(bench, device, quick):
                for dtype in shape.dtypes or bench.DTYPES[device]:
                    for mode in bench.MODES:
                        at = f"{bench.OP}-{mode}-{shape}-{str(dtype)[6:]}".replace(" ", "-")
                        for row in harness.rows_of(bench, device):
                            case = (bench, shape, dtype, mode, row)
                            mark = pytest.mark.benchmark(group=at)
                            cases.append(pytest.param(case, id=f"{at}-{row}", marks=mark))
    metafunc.parametrize("case", cases)


def test_row(benchmark, case, request):
    bench, shape, dtype, mode, row = case
    device = request.config.getoption("--bench-device")
    torch.manual_seed(0)
    inputs = bench.inputs(shape, dtype, device)
    call = bench.calls(inputs, mode).get(row, harness.Absent(f"has no {mode}"))
    if isinstance(call, harness.Absent):
        pytest.skip(f"{row}: {call.why}")
    wrong = bench.check(inputs, mode, row, call())
    assert not wrong, wrong

    def finished():
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(finished, warmup_rounds=2, rounds=5)
