"""What linear_logprob is said to hold, against what it allocates."""

import gc

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from hydra_kernels import linear_logprob
from hydra_kernels.ops import logprob_memory
from hydra_kernels.ops.logprob_memory import linear_logprob_memory


def moves(call):
    """(result, bytes held more than before, peak above before), by torch's allocator."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    events = profiler.profiler.kineto_results.events()
    live = peak = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        live += size
        peak = max(peak, live)
    return result, live, peak


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize(
    ("M", "D", "V", "dtype", "kept"),
    [
        (300, 256, 2000, torch.float32, 4 * 300 * 2000),  # small enough to be kept
        (300, 64, 2000, torch.float32, 0),  # too narrow to be worth it
        (1500, 256, 3000, torch.float32, 0),  # 18 MB
        (300, 255, 2000, torch.float16, 0),
        (300, 256, 2000, torch.bfloat16, 4 * 300 * 2000),
        (300, 256, 2000, torch.float16, 4 * 300 * 2000),
    ],
)
def test_of_a_cpu(M, D, V, dtype, kept, reference):
    """To a tenth, or more of few bytes: BLAS may not have every size of tile."""
    weight = torch.randn(V, D).to(dtype)
    hidden = torch.randn(M, D).to(dtype).requires_grad_()
    targets = torch.randint(V, (M,))
    targets[3] = -100
    given = {"ref_hidden": torch.randn(M, D).to(dtype)} if reference else {}
    linear_logprob(hidden, weight, targets, **given).logprobs.sum().backward()  # BLAS is tried once
    hidden.grad = None
    said = linear_logprob_memory(M, D, V, dtype, device="cpu", reference=reference)
    assert said.kept == kept * (1 + reference)

    out, held, peak = moves(lambda: linear_logprob(hidden, weight, targets, **given))
    results = 4 * M * (11 if reference else 9)
    assert held == pytest.approx(said.kept + results, rel=0.1)
    assert peak == pytest.approx(said.kept + said.forward + results, rel=0.1)
    loss = out.logprobs.sum() + (out.kl.sum() if reference else 0.0)
    _, _, peak = moves(loss.backward)
    assert peak == pytest.approx(said.backward + dtype.itemsize * M * D, rel=0.1)


def test_of_no_rows_and_without_backward():
    assert linear_logprob_memory(0, 8, 8, torch.float32, device="cuda") == (0, 0, 0)
    said = linear_logprob_memory(300, 256, 2000, torch.float32, device="cpu", differentiated=False)
    assert said.kept == 0


def test_of_a_gpu_by_hand():
    """2,048 rows of a 7b's head: all logits' gradients fit Triton's budget, in two bytes each."""
    said = linear_logprob_memory(2048, 4096, 32000, torch.bfloat16, device="cuda")
    assert said.kept == 0
    assert said.backward == 2048 * 32000 * 2 + 2048 * 4096 * 4
    # CUDA's: rows packed into whole tiles, and 1,024 by 8,192 logits.
    assert said.forward == 2048 * 4096 * 2 + 4 * 1024 * 8192 + 4 * 17 * 2048
    more = linear_logprob_memory(100_000, 4096, 32000, torch.bfloat16, device="cuda")
    rows = 98 * 1024
    assert more.backward == rows * 4096 * (2 + 4) + 1024 * 8192 * (4 + 2)


def test_of_a_gpu_is_as_triton_has_it(monkeypatch):
    triton = pytest.importorskip("triton")
    assert triton is not None
    from hydra_kernels.backends.triton import linear_logprob as backend

    assert logprob_memory.TRITON_BUDGET_MB == backend.DEFAULT_BUDGET_MB
    assert logprob_memory.TRITON_UNIT == backend.CHUNK_UNIT
    assert logprob_memory.TRITON_SPLITS == backend.MANY_SPLITS
    assert logprob_memory.NUM_SUMS == backend.NUM_SUMS
    monkeypatch.setenv("HYDRA_LOGPROB_BUDGET_MB", "3")
    for M in (1, 100, 5000):
        columns = backend._chunk(M, 2)
        said = linear_logprob_memory(M, 8, 10**9, torch.float16, device="cuda")
        assert said.backward >= M * columns * 2 + 4 * M * 8
