"""Lora_linear in Triton: each choice of blocks computes the same, and what is off is not read."""

import pytest
import torch

from tests.numerics import assert_no_worse_than_torch, device_of, fast_backends
from tests.ops.test_lora_linear import make_layer
from tests.ops.test_lora_linear_kernels import run

pytest.importorskip("triton", reason="needs Triton, which exists for Linux on x86-64")
if "triton" not in fast_backends("lora_linear"):
    pytest.skip("Triton's kernels run on a GPU or interpreted", allow_module_level=True)

from hydra_kernels.backends.triton import lora_linear as kernel
from hydra_kernels.backends.triton import lora_linear_tiles as tiles

DEVICE = device_of("triton")
FLOAT, HALF = torch.float32, torch.float16


def make_call(rows, k, n, ranks, dtype, ids, dropout=0.0):
    weight, bias, a, b, scaling = make_layer(n, k, ranks, dtype, device=DEVICE)
    x = torch.randn(len(ids), rows // len(ids), k, device=DEVICE).to(dtype)
    ids = torch.tensor(ids, device=DEVICE)
    seed = torch.tensor([3, 4], device=DEVICE)
    upstream = torch.randn(*x.shape[:-1], n, device=DEVICE)
    return [x, weight, bias, *a, *b], (len(ranks), scaling, ids, dropout, seed, upstream)


def assert_near_float64(inputs, settings):
    actual = run(inputs, *settings, "triton")
    same = run(inputs, *settings, "reference")
    exact = run([t.double() for t in inputs], *settings, "reference")
    for mine, torchs, right in zip(actual, same, exact, strict=True):
        # one ulp of the largest value: the reference rounds once or twice, and may be lucky
        ulp = torch.finfo(torchs.dtype).eps * max(right.abs().max().item(), 1e-3)
        assert_no_worse_than_torch(mine, torchs, right, atol=2 * ulp)
    return actual


@pytest.fixture
def chosen(monkeypatch):
    """Candidates by kernel; each takes the one at ``turn``, or its last."""
    seen = {}

    def choose(name, tensor, sizes, candidates, launch):
        seen.setdefault(name, {})[tuple(sizes)] = candidates
        return candidates[min(choose.turn, len(candidates) - 1)]

    choose.turn, choose.seen = 0, seen
    monkeypatch.setattr(kernel.tuning, "choose", choose)
    return choose


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=["float32", "float16"])
def test_every_choice_of_blocks_gives_the_same_answer(monkeypatch, chosen, dtype, dropout):
    """130 rows of 140 columns: two blocks of most candidates, and odd ends of all."""
    ids = [0, 1, -1, 1, 0, -1, -1, -1, 1, 0]
    ranks = (16, 5) if dtype == HALF else (9, 5)  # one block of ranks each
    call = make_call(130, 140, 20, ranks, dtype, ids, dropout)
    monkeypatch.setattr(kernel, "_PROGRAMS", 2)  # so that one sums over several blocks of rows
    turns = max(len(f(sum(ranks), dtype, dropout > 0)) for f in (tiles.shrink, tiles.contract))
    for turn in range(turns):
        chosen.turn = turn
        assert_near_float64(*call)
    assert turns > 2 and set(chosen.seen) == {"lora_linear_shrink", "lora_linear_contract"}
    for kinds in chosen.seen.values():
        assert all("M" not in sizes for sizes in kinds)  # a row's result is the same in any batch


@pytest.mark.parametrize("dtype", [FLOAT, HALF, torch.bfloat16])
@pytest.mark.parametrize("dropout", [False, True])
def test_candidates_are_different_and_blocks_of_ranks_the_default_s(dtype, dropout):
    for ranks in (1, 16, 17, 64, 500):
        for candidates in (tiles.shrink, tiles.contract):
            found = candidates(ranks, dtype, dropout)
            assert len({tuple(sorted(config.items())) for config in found}) == len(found)
            # the masks of dropout come by groups of eight columns
            assert all(config["BLOCK_C"] % 8 == 0 for config in found)
            assert {config["BLOCK_R"] for config in found} == {tiles.rank_block(ranks, dtype)}
