"""Lora_linear in Triton: each choice of blocks computes the same, and what is off is not read."""

import pytest
import torch
import torch.nn.functional as F

from hydra_kernels import Projection, lora_linear_group
from hydra_kernels.backends.lora_plan import Plan
from tests.numerics import assert_no_worse_than_torch, device_of, fast_backends
from tests.ops.test_lora_linear import make_layer
from tests.ops.test_lora_linear_kernels import run

pytest.importorskip("triton", reason="needs Triton, which exists for Linux on x86-64")
if "triton" not in fast_backends("lora_linear"):
    pytest.skip("Triton's kernels run on a GPU or interpreted", allow_module_level=True)

from hydra_kernels.backends.triton import lora_linear as kernel
from hydra_kernels.backends.triton import lora_linear_gates
from hydra_kernels.backends.triton import lora_linear_tiles as tiles
from hydra_kernels.backends.triton.lora_linear_gates import Gates

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
    r = sum(ranks)
    turns = max(
        len(tiles.shrink(r, dtype, dropout > 0)), len(tiles.contract(r, dtype, dropout > 0))
    )
    turns = max(turns, len(tiles.append(r, dtype, True)))
    for turn in range(turns):
        chosen.turn = turn
        assert_near_float64(*call)
    names = {"lora_linear_shrink", "lora_linear_fwd", "lora_linear_contract"}
    assert turns > 2 and set(chosen.seen) == names
    for name in names - {"lora_linear_fwd"}:  # cuBLAS chooses by M too
        # a row's result is the same in any batch
        assert all("M" not in sizes for sizes in chosen.seen[name])


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


# Of a call's first projection, and of the others.
PRODUCTS = ("lora_linear_fwd", "lora_linear_append")
APPENDED = {"APPEND": 1, "BLOCK_M": 16, "BLOCK_C": 32, "BLOCK_K": 16, "BLOCK_R": 16, "GROUP": 2}
APPENDED["TMA"] = 0


@pytest.fixture
def appended(monkeypatch):
    """The wide product and the adapter's in one kernel; counts its calls."""
    calls = []
    append = kernel._append

    def choose(name, tensor, sizes, candidates, launch):
        return APPENDED if name in PRODUCTS else candidates[0]

    def counted(*arguments):
        calls.append(arguments)
        return append(*arguments)

    monkeypatch.setattr(kernel.tuning, "choose", choose)
    monkeypatch.setattr(kernel, "_append", counted)
    return calls


@pytest.mark.parametrize("ids", [[0, 1, -1, 1, -1], [-1] * 5], ids=["mixed", "off"])
@pytest.mark.parametrize("inner", [48, 37])
@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=["float32", "float16"])
def test_the_adapter_in_the_wide_product(appended, dtype, inner, ids):
    """Three groups of row blocks, three of columns, and two blocks of ranks."""
    inputs, settings = make_call(70, inner, 70, (16, 5), dtype, ids)
    assert_near_float64(inputs, settings)
    inputs[1] = inputs[1].t().contiguous().t()  # GPT-2 keeps its weights this way
    actual = assert_near_float64(inputs, settings)
    assert len(appended) == 2 and not appended[1][1].is_contiguous()
    if set(ids) == {-1}:
        for tensor in actual[4:]:
            assert not tensor.any()


@pytest.fixture
def described(monkeypatch):
    """As ``appended``, with descriptors where they are offered; collects the configs taken."""
    taken = []

    def choose(name, tensor, sizes, candidates, launch):
        if name not in PRODUCTS:
            return candidates[0]
        offered = sizes["tma"]
        assert offered == any(config.get("TMA", 0) for config in candidates)
        taken.append({**APPENDED, "TMA": 1} if offered else candidates[0])
        return taken[-1]

    monkeypatch.setattr(kernel.tuning, "choose", choose)
    return taken


needs_tma = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability()[0] < 9,
    reason="needs an NVIDIA GPU of compute capability 9.0",
)


@needs_tma
@pytest.mark.parametrize("ids", [[0, 1, -1, 1, -1], [-1] * 5], ids=["mixed", "off"])
def test_the_adapter_in_a_wide_product_read_by_descriptors(described, ids):
    """Tails of rows, of columns and of K."""
    inputs, settings = make_call(70, 40, 72, (16, 5), HALF, ids)
    actual = assert_near_float64(inputs, settings)
    assert [config["TMA"] for config in described] == [1]
    if set(ids) == {-1}:
        poisoned = [*inputs[:3], *(torch.full_like(t, torch.nan) for t in inputs[3:])]
        for mine, other in zip(run(poisoned, *settings, "triton"), actual, strict=True):
            assert torch.equal(mine, other)


@needs_tma
@pytest.mark.parametrize("case", ["rows of x", "rows of y", "a transposed weight", "float32"])
def test_what_no_descriptor_can_read(described, case):
    k, n = (37 if case == "rows of x" else 40), (70 if case == "rows of y" else 72)
    dtype = FLOAT if case == "float32" else HALF
    inputs, settings = make_call(10, k, n, (5,), dtype, [0, -1])
    if case == "a transposed weight":
        inputs[1] = inputs[1].t().contiguous().t()
    assert_near_float64(inputs, settings)
    assert described == [{"APPEND": 0}]


def test_the_adapter_in_the_wide_product_of_a_group_and_without_bias(appended):
    x = torch.randn(9, 20, device=DEVICE)
    layers = [make_layer(n, 20, (r,), device=DEVICE, bias=False) for n, r in [(6, 2), (40, 18)]]
    projections = [Projection(w, a, b, s) for w, _, a, b, s in layers]
    actual = lora_linear_group(x, projections, backend="triton")
    for mine, other in zip(
        actual, lora_linear_group(x, projections, backend="reference"), strict=True
    ):
        torch.testing.assert_close(mine, other)
    assert len(appended) == 2


def test_the_wide_product_is_cublas_s_where_nothing_better_is_known(monkeypatch):
    """What this tells of tuning.choose is that its default, and its only one in float32, is off."""
    monkeypatch.setattr(kernel, "_append", None)
    assert_near_float64(*make_call(10, 8, 9, (3,), FLOAT, [0, -1]))
    for dtype in (FLOAT, HALF, torch.bfloat16):
        first, *others = tiles.append(16, dtype, True)
        assert first == {"APPEND": 0} and all(config["APPEND"] for config in others)
        assert bool(others) == (dtype != FLOAT)


@pytest.mark.parametrize("appends", [False, True], ids=["", "appended"])
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=["float32", "float16"])
def test_all_rows_off_skips_the_adapters(request, dtype, dropout, appends):
    """NaN in every adapter reaches nothing, and their gradients are zeros."""
    if appends:
        request.getfixturevalue("appended")
    inputs, settings = make_call(70, 40, 20, (16, 5), dtype, [-1] * 5, dropout)
    clean = run(inputs, *settings, "triton")
    poisoned = [*inputs[:3], *(torch.full_like(t, torch.nan) for t in inputs[3:])]
    for mine, other in zip(run(poisoned, *settings, "triton"), clean, strict=True):
        assert torch.equal(mine, other)
    assert all(not gradient.any() for gradient in clean[4:])
    torch.testing.assert_close(clean[0], F.linear(*inputs[:3]))


def test_many_adapters_of_which_few_are_used():
    """32 of rank 16; a block of ranks whose adapters are all off is passed over."""
    inputs, settings = make_call(32, 24, 20, (16,) * 32, FLOAT, [3, -1, 31, 3])
    clean = assert_near_float64(inputs, settings)
    poisoned = [
        torch.full_like(t, torch.nan) if i >= 3 and (i - 3) % 32 not in (3, 31) else t
        for i, t in enumerate(inputs)
    ]
    for mine, other in zip(run(poisoned, *settings, "triton"), clean, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=["float32", "float16"])
def test_blocks_of_rows_start_and_stop_at_their_own_adapters_ranks(dtype):
    """Adapters that begin and end inside blocks of ranks, in blocks of rows of one and of many."""
    ids = [0, 0, 2, 2, 1, -1, 3, 1, 2, 0, -1, -1]
    assert_near_float64(*make_call(12 * 16, 24, 20, (40, 9, 70, 33), dtype, ids))


@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=["float32", "float16"])
def test_past_many_ranks_rows_have_places_for_their_own_alone(monkeypatch, dtype):
    """A ninth of the sums over columns; ranks of one adapter in two blocks of ranks."""
    monkeypatch.setattr(lora_linear_gates, "MANY_RANKS", 64)
    shapes = []
    reduce = kernel._reduce

    def reduced(parts, out, gates):
        shapes.append(tuple(parts.shape[1:]))
        return reduce(parts, out, gates)

    monkeypatch.setattr(kernel, "_reduce", reduced)
    ids = [0, 3, 2, -1, 8, 3]
    assert_near_float64(*make_call(60, 24, 20, (12, 9, 5, *[12] * 6), dtype, ids))
    assert (60, 12) in shapes and (60, 98) not in shapes


def gates_of(ids, counts, owners, ranks, num_adapters):
    plan = Plan(counts, owners, (1.0,) * len(owners), num_adapters, 0.0)
    return Gates(plan, ranks, ids, torch.empty(2 if ids is None else len(ids), 8, device=DEVICE))


def test_spans_by_hand():
    ids = torch.tensor([0, 1], device=DEVICE)
    gates = gates_of(ids, (2, 1), (0, 2, 2), (20, 9, 40), 4)  # the second projection has one of 4
    # 1 and 3 have no adapter; 2 has one in each projection
    assert gates.spans(16).tolist() == [[0, 20], [69, 0], [20, 69], [69, 0]]
    first, second = gates.ranks(0, 29), gates.ranks(29, 69)
    assert first.spans(16).tolist() == [[0, 20], [29, 0], [20, 29], [29, 0]]
    assert second.spans(16).tolist() == [[40, 0], [40, 0], [0, 40], [40, 0]]
    assert first.spans(32) is None and second.spans(64) is None  # all in one block


def test_places_by_hand(monkeypatch):
    monkeypatch.setattr(lora_linear_gates, "MANY_RANKS", 4)
    ids = torch.tensor([0, 1], device=DEVICE)
    # the first projection has two adapters of 0, that run together, and one of 2
    gates = gates_of(ids, (3, 2), (0, 2, 0, 1, 2), (2, 5, 3, 4, 4), 3)
    first, second = gates.ranks(0, 10), gates.ranks(10, 18)
    assert first.within().tolist() == [0, 1, 0, 1, 2, 3, 4, 2, 3, 4] and first.width() == 5
    assert second.within().tolist() == [0, 1, 2, 3, 0, 1, 2, 3] and second.width() == 4
    assert gates.width() == 9  # of 18: one of them has half of all
    assert gates.ranks(0, 7).within() is None  # of 7, one has 5
    assert gates_of(None, (2,), (0, 0), (20, 20), 1).width() == 0  # all run on all rows
    assert lora_linear_gates._counted((0, 1, 0, 5, 6, 0), torch.device(DEVICE)).tolist() == [
        0, 1, 0, 5, 6, 0,
    ]  # fmt: skip


def test_an_id_that_no_adapter_has_is_off():
    """Only HYDRA_CHECK=1 looks at ids on a GPU."""
    ids = torch.tensor([0, 7, 2**20, 1], device=DEVICE)
    s, factor = torch.randn(4, 40, device=DEVICE), torch.randn(8, 40, device=DEVICE)
    gates = gates_of(ids, (2,), (0, 1), (20, 20), 2)
    s[0, 20:] = s[1:3] = s[3, :20] = 0.0  # as shrink leaves them
    y = kernel._expand(s, factor, None, gates, 0.0, None)
    torch.testing.assert_close(y, s @ factor.t())
