"""A replay computes what the recorded function would on the inputs of now."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hydra_kernels.ops.lora_linear import lora_linear
from hydra_kernels.replay import NotReplayable, Replay, draw_tokens, unavailable

pytestmark = pytest.mark.skipif(bool(unavailable()), reason="the C++ extension is not built")

# Sums of float32 in another order.
RTOL, ATOL = 1e-5, 2e-6


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def check(function, *inputs: Tensor, rtol: float = RTOL, atol: float = ATOL) -> Replay:
    """Records on ``inputs``, puts others in their place, and compares with plain PyTorch."""

    def run() -> tuple[Tensor, ...]:
        out = function(*inputs)
        return out if isinstance(out, tuple) else (out,)

    replay = Replay(run)
    for given in inputs:
        if given.is_floating_point():
            given.copy_(torch.randn(given.shape) * 1.5)
        else:
            given.copy_(given.flip(0))
    before = [given.clone() for given in inputs]
    expected = [t.clone() for t in run()]
    for given, was in zip(inputs, before, strict=True):
        given.copy_(was)  # where the function writes to them
    for out in replay.outputs:
        out.fill_(77)
    replay()
    for out, want in zip(replay.outputs, expected, strict=True):
        torch.testing.assert_close(out, want, rtol=rtol, atol=atol)
    return replay


def rows(*shape: int) -> Tensor:
    return torch.randn(shape)


UNARY = {
    "neg": torch.neg,
    "sqrt": lambda x: torch.sqrt(x.pow(2) + 1),
    "rsqrt": lambda x: torch.rsqrt(x.pow(2) + 0.5),
    "exp": torch.exp,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "cos": torch.cos,
    "sin": torch.sin,
    "floor": torch.floor,
    "log": lambda x: torch.log(x.pow(2) + 0.1),
    "cube": lambda x: x.pow(3),
    "root": lambda x: x.pow(2).pow(0.5),
    "scalars": lambda x: (x * 3.0 + 2.0) / 7.0 - 0.5,
}


@pytest.mark.parametrize("name", UNARY)
def test_elementwise(name, threads):
    """Alone, off a vector's multiple, and enough to be shared by threads."""
    for shape in ((1, 1), (3, 37), (5, 2039)):
        check(UNARY[name], rows(*shape), rtol=3e-5, atol=3e-6)


def test_relu_keeps_nan():
    x = torch.tensor([float("nan"), -1.0, 2.0])
    replay = Replay(lambda: (torch.relu(x),))
    replay()
    assert replay.outputs[0].isnan().tolist() == [True, False, False]


@pytest.mark.parametrize(
    "a, b",
    [
        ((4, 6), (4, 6)),
        ((4, 6), (6,)),
        ((4, 1), (1, 6)),
        ((2, 1, 3, 1), (2, 5, 1, 7)),
        ((16, 600), (16, 1)),
        ((16, 600), ()),
    ],
)
def test_broadcasting(a, b, threads):
    for function in (torch.add, torch.sub, torch.mul):
        check(function, rows(*a), rows(*b))
    check(lambda x, y: x / (y * y + 1), rows(*a), rows(*b))


def test_views_cost_nothing():
    x = rows(4, 6, 8)

    def function(x):
        left, right = x.transpose(0, 2)[1:7:2].split(3, dim=1)
        return left.permute(2, 0, 1) - right.permute(2, 0, 1)

    replay = check(function, x)
    assert len(replay) == 1


def test_copies_of_strided_tensors(threads):
    check(lambda x: x.transpose(0, 2).contiguous(), rows(3, 4, 5))
    check(lambda x: x[:, ::2].reshape(-1) + 1.0, rows(40, 500))
    check(lambda x: x[:, None].expand(3, 4, 5).clone(), rows(3, 5))


def test_concatenation():
    check(lambda x, y: torch.cat([x, y, x[:, :1]], dim=-1), rows(3, 4), rows(3, 2))
    check(lambda x, y: torch.cat([-x, y]), rows(3, 4), rows(1, 4))
    # without a part that has no elements
    check(lambda x: torch.cat([x[..., :0], x], dim=-1), rows(2, 3))


def test_integers():
    ids = torch.tensor([[3], [0], [4]])
    table = rows(7, 5)
    check(lambda ids, table: F.embedding(ids + 2, table), ids, table)
    check(lambda ids: ids.float() * 0.5, ids.clone())
    check(lambda ids: (ids * 3 - ids).float(), ids.clone())
    check(lambda ids, x: ids * x, ids.clone(), rows(3, 1))  # promoted to float32


@pytest.mark.parametrize("width", [1, 15, 33, 900])
def test_rows(width, threads):
    x, w, b = rows(17, width), rows(width), rows(width)
    check(lambda x: x.mean(-1, keepdim=True), x.clone(), atol=1e-5)
    check(lambda x: x.mean(-1), x.clone(), atol=1e-5)
    check(lambda x: torch.softmax(x * 5, -1), x.clone())
    if width > 1:  # one element is its own mean: 0 / sqrt(eps) in every order
        check(lambda x, w, b: F.layer_norm(x, (width,), w, b), x, w, b, atol=1e-5)
        check(lambda x: F.layer_norm(x, (width,)), x, atol=1e-5)


def test_rows_of_a_view():
    check(lambda x: x.t().mean(-1, keepdim=True), rows(30, 4))
    check(lambda x: torch.softmax(x[:, ::2].contiguous(), -1), rows(3, 8))


# One row, fewer than a tile, one more; columns and depth below, at and off a vector.
@pytest.mark.parametrize("M", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("N, K", [(1, 1), (5, 3), (17, 16), (64, 40), (130, 257)])
def test_products(M, N, K, threads):
    x, w, bias = rows(M, K), rows(N, K), rows(N)
    atol = 1e-5 * K**0.5
    check(lambda x, w: F.linear(x, w), x, w, atol=atol)
    check(lambda x, w, b: F.linear(x, w, b), x, w, bias, atol=atol)
    check(lambda x, w: x @ w, x, rows(K, N), atol=atol)  # as Conv1D keeps it
    check(lambda x, w, b: torch.addmm(b, x, w), x, rows(K, N), bias, atol=atol)
    check(lambda x, w: F.linear(x[:, None], w)[:, 0], x, w, atol=atol)


def test_product_of_scattered_rows():
    check(lambda x, w: F.linear(x[:, 1:9], w), rows(5, 12), rows(6, 8), atol=1e-5)
    check(lambda x, w: F.linear(x[::2], w[:, :8]), rows(5, 8), rows(6, 11), atol=1e-5)
    check(lambda x, w: F.linear(x.t(), w), rows(8, 5), rows(6, 8), atol=1e-5)


def test_batched_product():
    check(torch.bmm, rows(6, 2, 9), rows(6, 9, 20), atol=1e-5)
    check(lambda a, b: torch.bmm(a, b.transpose(1, 2)), rows(6, 1, 9), rows(6, 20, 9), atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("M, N, K, R", [(1, 40, 24, 4), (5, 33, 50, 16), (16, 130, 64, 9)])
def test_lora(M, N, K, R, transposed, threads):
    x, a, b, bias = rows(M, 1, K), rows(R, K), rows(N, R), rows(N)
    w = rows(K, N) if transposed else rows(N, K)

    def layer(x, w, a, b, bias):
        return lora_linear(x, w.t() if transposed else w, a, b, 0.25, bias=bias)

    replay = check(layer, x, w, a, b, bias, atol=1e-4)
    assert len(replay) == (3 if transposed else 2)  # the small product, and the rest at once


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention(heads, kv_heads, masked, threads):
    B, L, width = 3, 21, 24
    q, k, v = rows(B, 1, heads, width), rows(B, kv_heads, L, width), rows(B, kv_heads, L, width)
    mask = torch.zeros(B, L)
    lowest = torch.finfo(torch.float32).min
    mask[0, :4] = lowest  # left padding
    mask[1, 9:] = lowest  # slots to come
    mask[2, 3:7] = lowest  # between what is seen
    mask = mask if masked else torch.zeros(B, L)

    def attend(q, k, v):
        return F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k,
            v,
            attn_mask=mask[:, None, None] if masked else None,
            enable_gqa=heads != kv_heads,
        )

    check(attend, q, k, v, atol=1e-5)


def test_attention_of_a_row_that_sees_nothing():
    q, k, v = rows(2, 2, 1, 8), rows(2, 2, 6, 8), rows(2, 2, 6, 8)
    mask = torch.zeros(2, 1, 1, 6)
    mask[1] = torch.finfo(torch.float32).min
    check(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask), q, k, v)


def test_attention_does_not_read_what_is_masked():
    q, k, v = rows(1, 2, 1, 8), rows(1, 2, 6, 8), rows(1, 2, 6, 8)
    mask = torch.zeros(1, 1, 1, 6)
    mask[..., 4:] = torch.finfo(torch.float32).min
    replay = Replay(lambda: (F.scaled_dot_product_attention(q, k, v, attn_mask=mask),))
    expected = replay.outputs[0].clone()
    k[:, :, 4:] = torch.nan
    v[:, :, 4:] = torch.nan
    replay()
    torch.testing.assert_close(replay.outputs[0], expected, rtol=RTOL, atol=ATOL)


def test_writes_at_indices():
    buffer, value = torch.zeros(4, 2, 9, 3), rows(4, 2, 3)
    each, slot = torch.arange(4), torch.tensor([0, 8, 3, 3])

    def put(buffer, value, slot):
        buffer[each, :, slot] = value
        return buffer.clone()

    check(put, buffer, value, slot)
    flat = torch.ones(4, 9)

    def mark(flat, slot):
        flat[each, slot] = 0.0
        return flat * 2.0

    check(mark, flat, slot)


def test_in_place_order_is_kept():
    """A storage is read, written and read again."""
    buffer, x, index = rows(2, 3), rows(1, 3), torch.tensor([1])

    def function(buffer, x):
        before = buffer * 1.0
        buffer[index] = x
        return before, buffer + before

    check(function, buffer, x)


def test_storages_that_move():
    """Given back and taken again, as the engine does with keys and values between rollouts."""
    x, w = rows(3, 8), rows(500, 8)
    replay = Replay(lambda: (F.linear(x, w),))
    before = w.clone(), w.data_ptr()
    w.untyped_storage().resize_(0)
    other = torch.zeros(500, 8)  # where w was
    w.untyped_storage().resize_(64 << 20)  # too large for where it was
    w.copy_(before[0] * 2.0)
    assert w.data_ptr() != before[1]
    replay.refresh()
    replay()
    torch.testing.assert_close(replay.outputs[0], F.linear(x, w), rtol=RTOL, atol=1e-5)
    assert not other.any()


def test_arena_is_reused():
    x = rows(4, 64)

    def chain():
        y = x
        for _ in range(50):
            y = y * 1.01 + 0.5
        return (y,)

    replay = Replay(chain)
    assert replay.nbytes <= 3 * x.nbytes  # what two operations hold at once, and alignment
    replay()
    torch.testing.assert_close(replay.outputs[0], chain()[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda x: x.cumsum(-1).erf(), "aten.cumsum.default, aten.erf.default"),
        (lambda x: x * float(x.sum()), "aten._local_scalar_dense"),
        (lambda x: x.bfloat16() * 2, "torch.bfloat16"),
        (lambda x: x.double() * 2, "torch.float64"),
        (lambda x: x.pow(5), "a power of 5"),
        (lambda x: x.mean(0), r"a mean over dimensions \[0\]"),
        (lambda x: torch.softmax(x, 0), "a softmax over dimension 0"),
        (lambda x: torch.add(x, x, alpha=2), "with a factor"),
        (lambda x: x.exp_(), "aten.exp_"),
        (lambda x: torch.zeros(3, 4).index_put_((torch.tensor([0]),), x[:1], accumulate=True),
         "accumulates"),
    ],
)  # fmt: skip
def test_refuses_by_name(function, message):
    x = rows(3, 4)
    with pytest.raises(NotReplayable, match=message):
        Replay(lambda: (function(x),))


def test_recording_leaves_gradients_alone():
    x, w = rows(2, 3), torch.nn.Parameter(rows(4, 3))
    a, b = torch.nn.Parameter(rows(2, 3)), torch.nn.Parameter(rows(4, 2))
    Replay(lambda: (lora_linear(x, w, a, b, 1.0),))
    assert lora_linear(x, w, a, b, 1.0).requires_grad


# ---- draws

DRAWS = dict(temperature=0.7, late=(0, 5, 96), late_from=2)


@pytest.mark.parametrize("sample", [True, False])
@pytest.mark.parametrize("vocabulary", [1, 7, 97, 5000])
def test_draws_as_pytorch_does(sample, vocabulary, threads):
    B = 40
    logits, uniforms = rows(B, vocabulary), torch.rand(B, 4)
    columns = torch.arange(B)[:, None] % 4
    late = tuple(t for t in DRAWS["late"] if t < vocabulary - 1)

    def draw(logits):
        return draw_tokens(logits, uniforms, columns, sample=sample, **{**DRAWS, "late": late})

    check(draw, logits, atol=1e-5)


FILTERS = [
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 10**6},
    {"top_p": 0.0},
    {"top_p": 1e-6},
    {"top_p": 0.3},
    {"top_p": 0.999},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 200, "top_p": 0.9, "min_p": 0.01},
]


@pytest.mark.parametrize("settings", FILTERS, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 97, 5000])
def test_filtered_draws_as_pytorch_does(settings, vocabulary, threads):
    """Flat rows, whose top_p is past the first part that is sorted, and peaked ones."""
    B = 24
    scale = torch.logspace(-1.5, 1.0, B)[:, None]
    logits, uniforms = scale * rows(B, vocabulary), torch.rand(B, 4)
    columns = torch.arange(B)[:, None] % 4
    late = tuple(t for t in DRAWS["late"] if t < vocabulary - 1)
    for sample in (True, False):
        options = {**DRAWS, "late": late, **settings}
        replay = Replay(
            lambda sample=sample, options=options: draw_tokens(
                logits, uniforms, columns, sample=sample, **options
            )
        )
        for _ in range(2):
            expected = draw_tokens(logits, uniforms, columns, sample=sample, **options)
            replay()
            assert torch.equal(replay.outputs[0], expected[0])
            torch.testing.assert_close(replay.outputs[1], expected[1], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(replay.outputs[2], expected[2], rtol=1e-4, atol=1e-4)
            logits.copy_(scale * torch.randn(logits.shape))


def test_filters_and_equal_tokens():
    """top_k keeps all that equal the last; top_p the first of them in the vocabulary."""
    logits = torch.zeros(1, 8)
    logits[0, 5] = 1.0
    uniforms = torch.tensor([[1.0 - 2**-24]])
    columns = torch.zeros(1, 1, dtype=torch.long)
    p = torch.softmax(logits[0], -1)
    top_p = float(p[5] + 2.5 * p[0])  # reached within the third of the equal ones: 5, 0, 1, 2
    for settings, last, share in (
        ({"top_k": 2}, 7, 1.0),
        ({"top_p": top_p}, 5, float(p[5] + 3 * p[0])),
        ({"top_k": 1}, 5, float(p[5])),
    ):
        replay = Replay(
            lambda settings=settings: draw_tokens(logits, uniforms, columns, **settings)
        )
        replay.outputs[0].zero_()
        replay()
        token = int(replay.outputs[0])
        assert token == last
        expected = float(p[token]) / share
        assert float(replay.outputs[2].exp()) == pytest.approx(expected, rel=1e-5)


def test_draws_of_the_likeliest_late_token():
    """It is far above the others, whose weights beside it are 0 in float32."""
    logits = torch.zeros(2, 6)
    logits[:, 3] = 500.0
    logits[0, 1] = 2.0
    uniforms, columns = torch.tensor([[0.999], [0.5]]), torch.zeros(2, 1, dtype=torch.long)
    for sample in (False, True):
        replay = Replay(
            lambda sample=sample: draw_tokens(
                logits, uniforms, columns, sample=sample, late=(3,), late_from=1
            )
        )
        expected = [t.clone() for t in replay.outputs]
        replay()
        for out, want in zip(replay.outputs, expected, strict=True):
            torch.testing.assert_close(out, want, rtol=0, atol=1e-4)
        assert 3 not in replay.outputs[0]


def test_never_draws_what_has_no_probability():
    logits = torch.full((3, 70), -torch.inf)
    logits[:, 66] = 0.0
    uniforms = torch.tensor([[0.0], [0.5], [1.0 - 2**-24]])
    columns = torch.zeros(3, 1, dtype=torch.long)
    replay = Replay(lambda: draw_tokens(logits, uniforms, columns))
    replay()
    assert replay.outputs[0].tolist() == [[66]] * 3
    assert replay.outputs[1].abs().max() == 0.0


def test_draws_follow_the_softmax():
    """20000 draws of 40 tokens, each count within five deviations of what was asked for."""
    logits = 2 * rows(1, 40)
    B = 20000
    many, uniforms = logits.repeat(B, 1), torch.rand(B, 1)
    columns = torch.zeros(B, 1, dtype=torch.long)
    replay = Replay(lambda: draw_tokens(many, uniforms, columns))
    replay.outputs[0].zero_()
    replay()
    p = torch.softmax(logits[0].double(), -1)
    counts = torch.bincount(replay.outputs[0][:, 0], minlength=40).double()
    assert ((counts - B * p).abs() <= 5 * (B * p * (1 - p)).sqrt()).all()


# ---- vector levels, threads

LEVELS = """
import sys, torch
import torch.nn.functional as F
from hydra_kernels.ops.lora_linear import lora_linear
from hydra_kernels.replay import Replay
torch.manual_seed(0)
x, w, a, b = torch.randn(7, 50), torch.randn(61, 50), torch.randn(5, 50), torch.randn(61, 5)
q, k = torch.randn(2, 3, 1, 20), torch.randn(2, 3, 11, 20)
def function():
    y = lora_linear(x, w, a, b, 0.5)
    return F.silu(y) @ w, F.scaled_dot_product_attention(q, k, k), torch.softmax(y, -1)
replay = Replay(function)
for out in replay.outputs:
    out.zero_()
replay()
torch.save(replay.outputs, sys.argv[1])
"""


@pytest.mark.parametrize("level", ["baseline", "v3"])
def test_lower_vector_levels_compute_the_same(level, tmp_path, monkeypatch):
    path = str(tmp_path / "low")
    env = {**os.environ, "HYDRA_CPU_ISA": level, "PYTHONPATH": os.getcwd()}
    subprocess.run([sys.executable, "-c", LEVELS, path], env=env, check=True)
    mine = str(tmp_path / "mine")
    monkeypatch.setattr(sys, "argv", ["", mine])
    exec(LEVELS, {})
    for low, high in zip(torch.load(path), torch.load(mine), strict=True):
        torch.testing.assert_close(low, high, rtol=1e-4, atol=1e-4)


def test_threads_do_not_change_a_bit():
    x, w = rows(16, 300), rows(500, 300)
    replay = Replay(lambda: (F.silu(F.linear(x, w)).mean(-1, keepdim=True),))
    results = []
    before = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            replay()
            results.append(replay.outputs[0].clone())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
