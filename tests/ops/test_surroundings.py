"""What surrounds a call of an op and is no argument of it: torch's defaults, watchers, subclasses.

Kernels are given addresses. Where one is not that of a float32 on this device, nobody objects.
"""

from __future__ import annotations

import pytest
import torch

from hydra_kernels.backends.cpu import linear_logprob
from tests.gpu.cases import CASES, places

HERE = [place for place in places() if not place.marks]


@pytest.mark.parametrize(("name", "backend", "device"), HERE)
def test_default_device_and_dtype_do_not_matter(name, backend, device):
    case = CASES[name](device)
    expected = case.run(backend)
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.bfloat16, torch.float64):  # smaller and larger than what kernels write
            torch.set_default_dtype(dtype)
            linear_logprob._sizes.cache_clear()  # made with tensors of its own
            with torch.device("meta"):  # as any device but that of the tensors
                found = case.run(backend)
            for a, b in zip(found, expected, strict=True):
                assert a.device == b.device and a.dtype == b.dtype
                assert torch.equal(a, b)
    finally:
        torch.set_default_dtype(before)
