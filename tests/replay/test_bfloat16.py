"""bfloat16 weights, keys and values under replay: float32 between the operations.

Each result is no farther from float64 than PyTorch's own in bfloat16, which rounds more often.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hydra_kernels.ops.lora_linear import lora_linear
from hydra_kernels.replay import NotReplayable, Replay, unavailable

pytestmark = pytest.mark.skipif(bool(unavailable()), reason="the C++ extension is not built")
HALF = torch.bfloat16


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def halves(*shape: int) -> Tensor:
    return torch.randn(shape).to(HALF)


def check(function, *inputs: Tensor) -> Replay:
    """Recorded on ``inputs``, run on others, beside PyTorch in bfloat16 and in float64."""
    replay = Replay(lambda: (function(*inputs).float(),))
    for given in inputs:
        if given.is_floating_point():
            given.copy_(torch.randn(given.shape) * 1.5)
        else:
            given.copy_(given.flip(0))
    exact = function(*[t.double() if t.is_floating_point() else t for t in inputs])
    torchs = function(*inputs)
    replay.outputs[0].fill_(torch.nan)
    replay()
    ours = (replay.outputs[0].double() - exact).abs().max()
    theirs = (torchs.double() - exact).abs().max()
    assert ours <= max(theirs, 1e-5), f"{ours:.2e} off, PyTorch {theirs:.2e}"
    return replay


@pytest.mark.parametrize("M", [1, 4, 7])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (61, 50), (130, 33), (300, 128)])
def test_products(M, N, K, threads):
    check(lambda x, w, b: F.linear(x, w, b), halves(M, K), halves(N, K), halves(N))
    check(lambda x, w: x @ w, halves(M, K), halves(K, N))


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
@pytest.mark.parametrize("transposed", [False, True])
def test_lora_over_a_bfloat16_base(dtype, transposed, threads):
    """Adapters of the base's dtype, and of float32 as PEFT trains them."""
    M, N, K, R = 5, 61, 50, 8
    x, a, b = halves(M, K), torch.randn(R, K).to(dtype), torch.randn(N, R).to(dtype)
    w = halves(K, N).t() if transposed else halves(N, K)
    replay = Replay(lambda: (lora_linear(x, w, a, b, 0.5).float(),))
    exact = F.linear(x.double(), w.double()) + 0.5 * (x.double() @ a.double().T) @ b.double().T
    theirs = (lora_linear(x, w, a, b, 0.5).double() - exact).abs().max()
    replay.outputs[0].fill_(torch.nan)
    replay()
    assert (replay.outputs[0].double() - exact).abs().max() <= theirs


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 16), (6, 2, 20)])
def test_attention(heads, kv_heads, width, threads):
    B, L = 3, 37
    mask = torch.zeros(B, 1, 1, L, dtype=HALF)
    mask[0, ..., :20] = torch.finfo(HALF).min
    mask[1, ..., 30:] = torch.finfo(HALF).min
    q, k, v = (
        halves(B, heads, 1, width),
        halves(B, kv_heads, L, width),
        halves(B, kv_heads, L, width),
    )

    def attend(q, k, v):
        keys, values = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        hidden = mask.to(q.dtype) if q.dtype == HALF else mask.to(q.dtype).clamp(min=-1e300)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=hidden)

    replay = Replay(lambda: (F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, enable_gqa=True).float(),))  # fmt: skip
    exact = attend(q.double(), k.double(), v.double())
    theirs = (attend(q, k, v).double() - exact).abs().max()
    # what is not seen is not read
    k[0, :, :20], v[0, :, :20] = torch.nan, torch.nan
    replay.outputs[0].fill_(torch.nan)
    replay()
    assert (replay.outputs[0].double() - exact).abs().max() <= theirs


def test_norms_embeddings_and_writes(threads):
    table, ids, scale = halves(30, 24), torch.tensor([3, 29, 0, 3]), halves(24)
    check(lambda table, ids: F.embedding(ids, table), table, ids)
    check(lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * w,
          halves(4, 24), scale)  # fmt: skip
    check(lambda x, w, b: F.layer_norm(x, (24,), w, b), halves(4, 24), halves(24), halves(24))
    check(lambda x: torch.softmax(F.silu(x), -1), halves(5, 70))
    check(lambda a, b: torch.cat([a[..., :3], b], -1) + b[..., :1], halves(2, 6), halves(2, 5))


def test_writes_round_to_the_nearest():
    """Ties to even, as PyTorch's conversion; what is not finite stays so."""
    edge = [1.0, 1.00390625, 1.01171875, -1.00390625, 3.4e38, float("inf"), float("nan"), 1e-40]
    value = torch.tensor([edge, edge[::-1]])
    buffer, rows, slots = torch.zeros(2, 5, 8, dtype=HALF), torch.arange(2), torch.tensor([4, 1])

    def write():
        buffer[rows, slots] = value.to(HALF)
        return (value * 2,)

    replay = Replay(write)
    expected = buffer.clone()
    buffer.zero_()
    replay()
    assert torch.equal(buffer.isnan(), expected.isnan()) and buffer.isnan().sum() == 2
    bits, wanted = (t.masked_fill(t.isnan(), 0.0).view(torch.int16) for t in (buffer, expected))
    assert torch.equal(bits, wanted)


@pytest.mark.parametrize("function", [
    lambda x: x.half() * 2,
    lambda x: (x * x,),
], ids=["float16", "output"])  # fmt: skip
def test_refuses_by_name(function):
    x = halves(3)

    def run():
        out = function(x)
        return out if isinstance(out, tuple) else (out.float(),)

    with pytest.raises(NotReplayable, match=r"torch\.(float16|bfloat16)"):
        Replay(run)
