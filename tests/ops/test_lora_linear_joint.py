"""Lora_linear's joint kernel: the wide product, s and what s adds, in one grid."""

import pytest
import torch

from benchmarks.measure import graphed
from hydra_kernels import Projection, lora_linear_group
from hydra_kernels.backends.lora_plan import Plan
from tests.numerics import device_of, fast_backends
from tests.ops.test_lora_linear import make_layer
from tests.ops.test_lora_linear_kernels import run

pytest.importorskip("triton", reason="needs Triton, which exists for Linux on x86-64")
if "triton" not in fast_backends("lora_linear"):
    pytest.skip("Triton's kernels run on a GPU or interpreted", allow_module_level=True)

from triton.runtime import interpreter

from hydra_kernels.backends.triton import lora_linear as kernel
from hydra_kernels.backends.triton import lora_linear_joint as joint
from hydra_kernels.backends.triton import runtime
from hydra_kernels.backends.triton.lora_linear_gates import Gates
from tests.ops.test_lora_linear_triton import assert_near_float64, make_call, needs_tma

DEVICE = device_of("triton")
HALF = torch.float16
pytestmark = needs_tma

BLOCKS = {"JOINT": 1, "BLOCK_M": 16, "BLOCK_C": 32, "BLOCK_K": 16, "BLOCK_R": 16, "BLOCK_S": 16}
BLOCKS |= {"GROUP": 2, "STAGES": 2, "PER_SM": 1, "num_warps": 4, "num_stages": 2}
MIXED, OFF, ALL_OF_ONE = [0, 1, -1, 1, -1], [-1] * 5, [1] * 5


@pytest.fixture
def joined(monkeypatch):
    """Takes the joint kernel wherever it is offered; collects the counters of its launches."""
    seen = []
    counters = joint.launch.counters

    def choose(name, tensor, sizes, candidates, launch):
        offered = any(config.get("JOINT") for config in candidates)
        return choose.blocks if offered else candidates[0]

    def kept(*arguments):
        seen.append(counters(*arguments))
        return seen[-1]

    choose.blocks = BLOCKS
    monkeypatch.setattr(kernel.tuning, "choose", choose)
    monkeypatch.setattr(joint.launch, "counters", kept)
    choose.seen = seen
    return choose


@pytest.mark.parametrize("ids", [MIXED, OFF, ALL_OF_ONE], ids=["mixed", "off", "of one"])
@pytest.mark.parametrize("ranks", [(7, 5), (16, 5)], ids=["a block of ranks", "two"])
def test_near_float64(joined, ranks, ids):
    """Tails of rows, of columns, of K and of ranks; five blocks of rows, three of columns."""
    inputs, settings = make_call(70, 40, 72, ranks, HALF, ids)
    actual = assert_near_float64(inputs, settings)
    assert len(joined.seen) == 2  # forward and backward
    if ids == OFF:
        assert all(not gradient.any() for gradient in actual[4:])
    assert not any(counters.any() for counters in joined.seen)  # ready for the next launch


def test_weights_in_columns(joined):
    """Forward and backward read them the other way round."""
    inputs, settings = make_call(37, 24, 40, (7,), HALF, [0])
    inputs[1] = inputs[1].t().contiguous().t()  # GPT-2 keeps its weights this way
    assert_near_float64(inputs, settings)
    assert len(joined.seen) == 2


@pytest.mark.parametrize(("of_unit", "programs"), [(1, 50), (2, 2), (7, 1)])
def test_who_does_what_changes_nothing(joined, monkeypatch, of_unit, programs):
    """Units of one block of rows, of two, and all in one; fewer programs than blocks, and more."""
    inputs, settings = make_call(70, 40, 72, (16, 5), HALF, MIXED)
    expected = run(inputs, *settings, "triton")
    monkeypatch.setattr(runtime, "multiprocessors", lambda device: programs)
    monkeypatch.setattr(joint, "blocks_of_unit", lambda *sizes: of_unit)
    actual = run(inputs, *settings, "triton")
    for i, (mine, other) in enumerate(zip(actual, expected, strict=True)):
        if i < len(actual) - 2:
            assert torch.equal(mine, other)
        else:  # of dB, the parts are other sums
            torch.testing.assert_close(mine, other, rtol=2e-3, atol=1e-3)


def test_without_ids(joined):
    inputs, settings = make_call(37, 24, 40, (5,), HALF, [0])
    count, scaling, _, *others = settings
    assert_near_float64(inputs, (count, scaling, None, *others))
    assert len(joined.seen) == 2


def test_dropout_is_s_s(joined):
    """Forward; backward it would be a mask of what s adds, which has no sums of its own."""
    inputs, settings = make_call(70, 40, 72, (16, 5), HALF, MIXED, 0.3)
    assert_near_float64(inputs, settings)
    assert len(joined.seen) == 1


def test_a_group_has_s_of_all_with_the_first(joined):
    x = torch.randn(37, 24, device=DEVICE, dtype=HALF)
    layers = [make_layer(n, 24, (r,), HALF, device=DEVICE) for n, r in [(40, 18), (8, 2), (16, 9)]]
    projections = [Projection(w, a, b, s, bias) for w, bias, a, b, s in layers]
    doubles = [
        Projection(w.double(), [t.double() for t in a], [t.double() for t in b], s, bias.double())
        for w, bias, a, b, s in layers
    ]
    actual = lora_linear_group(x, projections, backend="triton")
    exact = lora_linear_group(x.double(), doubles, backend="reference")
    assert len(joined.seen) == 1
    for mine, right in zip(actual, exact, strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=4e-3, atol=4e-3)


def test_all_rows_off_skips_the_adapters(joined):
    """NaN in every adapter reaches nothing."""
    inputs, settings = make_call(70, 40, 72, (16, 5), HALF, OFF)
    clean = run(inputs, *settings, "triton")
    poisoned = [*inputs[:3], *(torch.full_like(t, torch.nan) for t in inputs[3:])]
    for mine, other in zip(run(poisoned, *settings, "triton"), clean, strict=True):
        assert torch.equal(mine, other)
    assert len(joined.seen) == 4


def test_an_adapter_that_is_infinite_leaves_off_rows_alone(joined):
    """In one block of rows with those that it runs on."""
    inputs, settings = make_call(10, 24, 40, (3,), HALF, [0, -1])
    clean = run(inputs, *settings, "triton")[0]
    inputs[3] = torch.full_like(inputs[3], torch.inf)
    y = run(inputs, *settings, "triton")[0]
    assert torch.equal(y[1], clean[1]) and not y[0].isfinite().any()


@pytest.mark.parametrize("case", ["rows of x", "rows of y", "float32", "ranks"])
def test_is_not_offered_for(joined, case):
    k, n = (37 if case == "rows of x" else 40), (70 if case == "rows of y" else 72)
    dtype = torch.float32 if case == "float32" else HALF
    ranks = (joint.MAX_RANKS + 1,) if case == "ranks" else (5,)
    inputs, settings = make_call(10, k, n, ranks, dtype, [0, -1])
    assert_near_float64(inputs, settings)
    assert not joined.seen


def test_nothing_is_launched_for_no_rows(joined):
    inputs, settings = make_call(2, 24, 40, (5,), HALF, [0, -1])
    inputs[0] = inputs[0][:, :0]
    settings = (*settings[:-1], settings[-1][:, :0])
    y, dx, *_ = run(inputs, *settings, "triton")
    assert y.shape == (2, 0, 40) and dx.shape == (2, 0, 24) and not joined.seen


def test_a_captured_graph_obeys_new_ids(joined):
    """With counters of its own. Where nothing is captured, the same with a call in its place."""
    inputs, settings = make_call(70, 40, 72, (16, 5), HALF, MIXED)
    ids = settings[2]

    def call():
        return run(inputs, *settings, "triton")

    replay = graphed(call) if DEVICE == "cuda" else call
    before = None
    for chosen in (MIXED, ALL_OF_ONE, OFF, MIXED):
        ids.copy_(torch.tensor(chosen))
        after = [t.clone() for t in replay()]
        for mine, other in zip(after, call(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)
        assert before is None or not torch.equal(before, after[0])
        before = after[0]


@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU: two streams at once")
@pytest.mark.parametrize("per_sm", [1, 8], ids=["all programs fit", "one in eight fits"])
def test_two_streams_at_once(joined, per_sm):
    """Programs of two launches in each other's way: none hangs, and none takes another's counts."""
    inputs, settings = make_call(4096, 1024, 2048, (16, 5), HALF, MIXED[:4])
    joined.blocks = {**joint.candidates(21, 21, True)[0], "PER_SM": per_sm}
    expected = run(inputs, *settings, "triton")
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(run(inputs, *settings, "triton"))
    torch.cuda.synchronize()
    assert len({counters.data_ptr() for counters in joined.seen}) == 3
    for actual in found:
        for i, (mine, other) in enumerate(zip(actual, expected, strict=True)):
            if i in (2, 3):  # of weight and bias, which are cuBLAS's and torch's own
                torch.testing.assert_close(mine, other, rtol=1e-2, atol=1e-2)
            else:
                assert torch.equal(mine, other), i


@pytest.mark.skipif(DEVICE == "cuda", reason="is a program of the interpreter, which can be met")
def test_waits_for_units_that_are_in_other_hands(joined, monkeypatch):
    """Their tickets have been drawn; s is written, and counted, while the kernel runs."""
    x, weight = torch.randn(37, 24).to(HALF), torch.randn(40, 24).to(HALF)
    a, b, right = (torch.randn(size).to(HALF) for size in [(5, 24), (40, 5), (37, 5)])
    plan = Plan((1,), (0,), (1.0,), 1, 0.0)
    launched = joint.lora_linear_joint_kernel
    atomics = []

    class InOtherHands:
        def __getitem__(self, grid):
            def start(*arguments, **constants):
                s, counters = arguments[3], arguments[10]
                s.fill_(torch.nan)
                counters[0] = 3  # three blocks of rows, each a unit
                builder = interpreter.interpreter_builder
                original = builder.create_atomic_rmw

                def counted(*operands):
                    atomics.append(None)
                    if len(atomics) == 4:  # the first program's ticket, and it has looked twice
                        s.copy_(right)
                        counters[1] = 3
                    return original(*operands)

                monkeypatch.setattr(builder, "create_atomic_rmw", counted)
                launched[grid](*arguments, **constants)

            return start

    monkeypatch.setattr(joint, "lora_linear_joint_kernel", InOtherHands())
    gates = Gates(plan, (5,), None, x)
    y, _, _ = joint.product(x, weight, None, a.t(), None, b, gates, 0.0, None, BLOCKS)
    expected = x.double() @ weight.double().t() + right.double() @ b.double().t()
    torch.testing.assert_close(y.double(), expected, rtol=2e-3, atol=2e-2)
    # Each of three programs has drawn and left, and looked: the first three times, the others once.
    assert len(atomics) == 3 * 2 + 3 + 1 + 1


def test_blocks_of_a_unit_by_hand():
    # 64 blocks of rows by 16 of columns: 1024 = 7 x 132 + 100, so that 32 programs have 7, not 8
    assert joint.blocks_of_unit(64, 1024, 132) == 2
    assert joint.blocks_of_unit(64, 1056, 132) == 1  # all have 8: shared by all
    assert joint.blocks_of_unit(64, 1055, 132) == 4  # one has fewer: not all 64 for it
    assert joint.blocks_of_unit(8, 32, 132) == 1


def test_every_candidate_gives_the_same_answer(joined):
    inputs, settings = make_call(140, 72, 264, (16, 5), HALF, [0, 1, -1, 1, 0, -1, -1])
    for config in joint.candidates(21, 21, True):
        joined.blocks = config
        assert_near_float64(inputs, settings)


def test_candidates_differ():
    for ranks in (1, 16, 17, 64, 200):
        found = joint.candidates(ranks, ranks, True)
        assert len({tuple(sorted(config.items())) for config in found}) == len(found)
        assert all(config["JOINT"] and config["BLOCK_K"] % 8 == 0 for config in found)


def test_unasked_it_is_never_taken(monkeypatch):
    monkeypatch.setattr(joint, "product", None)
    assert_near_float64(*make_call(10, 24, 40, (3,), HALF, [0, -1]))
