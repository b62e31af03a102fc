"""linear_logprob in Triton where the copy engine brings the blocks, and when it may."""

import mmap

import pytest
import torch

from hydra_kernels import linear_logprob
from tests.numerics import device_of, fast_backends
from tests.ops.test_linear_logprob import make_inputs, run, to_double

pytest.importorskip("triton", reason="needs Triton, which exists for Linux on x86-64")
if "triton" not in fast_backends("linear_logprob"):
    pytest.skip("Triton's kernels run on a GPU or interpreted", allow_module_level=True)

from hydra_kernels.backends.triton import linear_logprob as kernel

DEVICE = device_of("triton")
if DEVICE == "cuda" and torch.cuda.get_device_capability()[0] < 9:
    pytest.skip("needs an NVIDIA GPU of compute capability 9.0", allow_module_level=True)

BLOCKS = {
    "fwd": ("BLOCK_M", "BLOCK_V", "BLOCK_D"),
    "dlogits": ("BLOCK_M", "BLOCK_V", "BLOCK_D"),
    "dhidden": ("BLOCK_M", "BLOCK_D", "BLOCK_V"),
}


SPECIALIZED = pytest.mark.parametrize("described", [0, 1], indirect=True, ids=["", "specialized"])


@pytest.fixture
def described(request, monkeypatch):
    """Small blocks, all by descriptors; collects the candidates that each kernel had."""
    seen: dict[str, list] = {}
    specialize = getattr(request, "param", 0)
    smallest = (32, 64, 32)
    if DEVICE == "cuda":
        smallest = (128, 64, 64) if specialize else (64, 64, 32)

    def choose(name, tensor, sizes, candidates, launch):
        name = name.removeprefix("linear_logprob_")
        seen[name] = candidates
        if not any(config["TMA"] for config in candidates):
            return candidates[0]
        config = dict(zip(BLOCKS[name], smallest, strict=True)) | {"TMA": 1, "GROUP": 2}
        offered = any(config["SPECIALIZE"] for config in candidates)  # else it may not compile
        how = {"SPECIALIZE": int(specialize and (offered or DEVICE == "cpu"))}
        return config | how | {"num_warps": 4, "num_stages": 2}

    monkeypatch.setattr(kernel.tuning, "choose", choose)
    # two blocks a split, the last split with one; several splits a program
    monkeypatch.setattr(kernel, "MANY_SPLITS", 5)
    # two chunks of the vocabulary
    monkeypatch.setenv("HYDRA_LOGPROB_BUDGET_MB", str(kernel.CHUNK_UNIT * 70 * 2 / 2**20))
    return seen


def half_inputs(D=72, V=523, **kw):
    """Tails of rows, of D and of V, for blocks of any size."""
    return make_inputs(70, D, V, DEVICE, torch.float16, **kw)


@pytest.mark.parametrize("reference", [False, True], ids=["", "reference"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@SPECIALIZED
def test_descriptors_give_the_same_answer(described, reference, bias):
    inputs = half_inputs(bias=bias)
    if not reference:
        inputs["ref_hidden"] = None
    upstream = torch.randn(4, 70, device=DEVICE)
    results, grads = run(inputs, upstream, backend="triton", temperature=0.9)
    assert set(described) == set(BLOCKS)
    assert all(any(config["TMA"] for config in found) for found in described.values())
    exact, exact_grads = run(
        to_double(inputs), upstream.double(), backend="reference", temperature=0.9
    )
    for name, t in results.items():
        torch.testing.assert_close(t.double(), exact[name], rtol=1e-5, atol=1e-5)
    for grad, right in zip(grads, exact_grads, strict=True):
        error = (grad.double() - right).norm() / right.norm()
        assert error < 2 * torch.finfo(torch.float16).eps  # dz and the result are rounded to it


def test_descriptors_read_rows_that_do_not_count_and_drop_them(described):
    inputs = half_inputs()
    upstream = torch.randn(4, 70, device=DEVICE)
    off = (inputs["targets"] == -100).unsqueeze(-1)
    clean = run(inputs, upstream, backend="triton")
    for poison in (torch.nan, torch.inf):
        for name in ("hidden", "ref_hidden"):
            inputs[name] = torch.where(off, poison, inputs[name])
        out, grads = run(inputs, upstream, backend="triton")
        assert off.any() and all(torch.equal(out[name], clean[0][name]) for name in out)
        for a, b in zip(grads, clean[1], strict=True):
            assert torch.equal(a, b)


@SPECIALIZED
def test_a_row_is_the_same_in_any_batch_and_any_layout(described):
    inputs = half_inputs(ignored=0.0)
    upstream = torch.randn(4, 70, device=DEVICE)
    whole, (dhidden,) = run(inputs, upstream, leaves=("hidden",), backend="triton")
    few = {n: t[33:] if t is not None and len(t) == 70 else t for n, t in inputs.items()}
    # rows of a wider matrix: apart by 80 elements
    few["hidden"] = torch.nn.functional.pad(few["hidden"], (0, 8))[:, :72]
    part, (d,) = run(few, upstream[:, 33:], leaves=("hidden",), backend="triton")
    assert described["fwd"][-1]["TMA"] and not few["hidden"].is_contiguous()
    assert all(torch.equal(part[name], whole[name][33:]) for name in part)
    assert torch.equal(d, dhidden[33:])


@pytest.mark.parametrize("case", ["unaligned rows", "a column-major head", "an odd address"])
def test_what_no_descriptor_can_read_is_read_by_pointers(described, case):
    inputs = half_inputs(D=73 if case == "unaligned rows" else 72, ignored=0.0)
    if case == "a column-major head":
        inputs["weight"] = inputs["weight"].t().contiguous().t()
    if case == "an odd address":
        flat = torch.empty(70 * 72 + 1, dtype=torch.float16, device=DEVICE)
        inputs["hidden"] = flat[1:].view(70, 72).copy_(inputs["hidden"])
    results = run(inputs, backend="triton", leaves=())  # as they are, not copies
    assert not any(config["TMA"] for config in described["fwd"])
    exact = run(to_double(inputs), backend="reference")
    for name, t in results.items():
        torch.testing.assert_close(t.double(), exact[name], rtol=1e-5, atol=1e-5)


def test_saved_logits_are_made_by_pointers(described):
    results, grads = run(
        half_inputs(), torch.ones(4, 70, device=DEVICE), backend="triton", memory="save"
    )
    taken = {name: any(c["TMA"] for c in found) for name, found in described.items()}
    assert taken == {"fwd": False, "dlogits": False, "dhidden": True}
    assert all(torch.isfinite(t).all() for t in [*results.values(), *grads])


def test_older_gpus_and_float32_are_offered_no_descriptors():
    for itemsize, major, tma in [(4, 9, True), (2, 9, False)]:
        for has_ref in (False, True):
            assert not any(
                tile.tma for tile in kernel._candidates(itemsize, has_ref, False, major, tma, True)
            )
        assert not any(config["TMA"] for config in kernel._dhidden_candidates(itemsize, tma))
    runtime = kernel.runtime
    assert runtime.has_tma(torch.zeros(2, 8)) and not runtime.has_tma(torch.zeros(0, 8))


@pytest.mark.parametrize(
    "V, width, blocks, even",
    [
        (32000, 256, 1, True),
        (128256, 256, 3, True),  # 501 blocks: two a split would leave one over
        (128256, 128, 6, True),
        (151936, 256, 4, False),  # 593.5 blocks
        (256 * 997, 256, 6, False),  # a prime number of them
        (50257, 128, 3, False),
        (1, 256, 1, False),
    ],
)
def test_blocks_are_shared_out_without_one_left_over_where_they_can(V, width, blocks, even):
    found = kernel._blocks_of_split(V, width)
    assert found == blocks and (V % (found * width) == 0) == even
    assert -(-V // (found * width)) <= kernel.MANY_SPLITS


def test_what_does_not_compile_specialized_is_not_offered():
    """Two sums, with a bias or columns beyond V; and their gradient, which spills."""

    def offers(found):
        return any(config["SPECIALIZE"] for config in found)

    assert offers(kernel._fwd_candidates(2, False, False, 9, True, False))
    assert offers(kernel._fwd_candidates(2, True, False, 9, True, True))
    assert not offers(kernel._fwd_candidates(2, True, False, 9, True, False))
    assert offers(kernel._dlogits_candidates(2, False, False, 9, True, True))
    assert not offers(kernel._dlogits_candidates(2, True, False, 9, True, True))


def test_the_users_own_allocator_is_put_back():
    from triton.runtime import _allocation

    before = _allocation._allocator.get()
    seen = []
    kernel.runtime.launch_with_scratch(
        lambda size, n: seen.append((size, n, _allocation._allocator.get())), 3, n=4
    )
    assert seen[0][:2] == (3, 4) and seen[0][2] is not before
    assert _allocation._allocator.get() is before


@pytest.mark.skipif(
    DEVICE == "cuda", reason="4 GiB, of which only a CPU touches no more than asked"
)
def test_columns_of_operands_may_lie_2_to_the_31_apart():
    """As those of a transposed head do: 262144 tokens by 8192 columns are 2^31 elements."""
    M, D, V, apart = 5, 3, 37, 2**30 + 64
    no_reserve = 0x4000  # Linux's MAP_NORESERVE: pages are there from when they are written
    pages = mmap.mmap(-1, 4 * apart + 4096, flags=mmap.MAP_PRIVATE | no_reserve)
    memory = torch.frombuffer(pages, dtype=torch.float16)
    near = make_inputs(M, D, V, DEVICE, torch.float16)
    far = dict(near)
    for name, at in (("weight", 0), ("hidden", V), ("ref_hidden", V + M)):
        far[name] = memory.as_strided(near[name].shape, (1, apart), at).copy_(near[name])
    found = linear_logprob(**far, backend="triton")
    for a, b in zip(found, linear_logprob(**near, backend="triton"), strict=True):
        assert torch.equal(a, b)
