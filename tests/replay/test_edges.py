"""What a replay refuses, and what it does with indices and settings at their ends."""

import pytest
import torch
import torch.nn.functional as F

from hydra_kernels.backends import recording
from hydra_kernels.ops.lora_linear import lora_linear
from hydra_kernels.replay import NotReplayable, Replay, draw_tokens, filter_logprobs, unavailable

replayed = pytest.mark.skipif(bool(unavailable()), reason="the C++ extension is not built")


def lora(**options):
    w, a, b = torch.randn(5, 4), torch.randn(2, 4), torch.randn(5, 2)
    return lambda x: lora_linear(x, w, a, b, 1.0, **options)


def attend(**options):
    q = torch.randn(2, 2, 3, 8)
    return lambda x: F.scaled_dot_product_attention(q, q, q, **options)


def written(*index):
    buffer = torch.zeros(3, 4)

    def write(x):
        buffer[index] = 1.0
        return buffer * 2.0

    return write


ZERO, ONE = torch.tensor([0]), torch.tensor([0, 1])
TABLE = torch.randn(7, 5)
TABLE5 = torch.randn(2, 3, 4, 5, 6)
COLUMNS = torch.zeros(5, 1, dtype=torch.long)
IDS = torch.tensor([[1, 2], [3, 4]])


@replayed
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (attend(is_causal=True), "causal attention"),
        (lora(adapter_ids=torch.tensor(0)), "adapter ids in a tensor"),
        (lambda x: torch.zeros(3, 4).index_put_((torch.tensor([0]),), x[:1]) * 2, "to a constant"),
        (written(slice(None), ZERO), "lists of indices"),
        (written(ONE[:, None]), "lists of indices"),
        (written(torch.tensor([True, False, True])), "lists of indices"),
        (written(ONE, ZERO), "lists of indices"),
        (lambda x: F.embedding(IDS.t(), TABLE), "ids or table are not contiguous"),
        (lambda x: F.embedding(IDS, TABLE.t()), "ids or table are not contiguous"),
        (lambda x: torch.addmm(x, x[:, :3], x), "an addmm to 2 dimensions times 1"),
        (lambda x: torch.addmm(x[0], x[:, :3], x, beta=2), "times 2"),
        (lambda x: F.layer_norm(x, (4,), TABLE[:4, 0]), "weight is not contiguous"),
        (lambda x: x.bfloat16().mean(-1, dtype=torch.float32), "a mean .* in torch.float32"),
        (lambda x: TABLE5.permute(4, 2, 0, 3, 1) * 2, "over 5 dimensions"),
        (lambda x: draw_tokens(TABLE.t(), TABLE, COLUMNS)[1], "from logits or uniforms"),
        (lambda x: draw_tokens(TABLE[:2], TABLE[:2], IDS[:, :1])[1], "columns are not contiguous"),
        (lambda x: x[:0] * 2, "an empty tensor"),
    ],
)  # fmt: skip
def test_refuses_by_name(function, message):
    x = torch.randn(3, 4)
    with pytest.raises(NotReplayable, match=message):
        Replay(lambda: (function(x),))


def test_a_function_that_fails_leaves_nothing_on():
    def fails():
        raise RuntimeError("no")

    for before in (False, True):
        recording.state.on = before
        try:
            with pytest.raises((RuntimeError, NotReplayable)):
                Replay(fails)
            assert recording.state.on == before
        finally:
            recording.state.on = False


@replayed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("threads", [1, 2])
def test_an_index_outside_is_an_error_and_touches_nothing(dtype, threads):
    """PyTorch's own are errors too. What lies beside the tensors stays as it was."""
    beside, table = torch.zeros(9, 3, 5, dtype=dtype), torch.randn(9, 5).to(dtype)
    buffer, rows = beside[2:6], table[2:6]
    ids, first, second = torch.tensor([1, 2]), torch.tensor([0, 1]), torch.tensor([0, 2])
    value = torch.ones(2, 5, dtype=dtype)
    put = Replay(lambda: (buffer.index_put_((first, second), value)[0, 0].float() * 1,))
    gather = Replay(lambda: (F.embedding(ids, rows).float() * 1,))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for outside in (4, -1, 10**9):
            ids[1] = outside
            gather.outputs[0].zero_()
            with pytest.raises(IndexError, match="an index is outside of its tensor"):
                gather()
            assert torch.equal(gather.outputs[0][0], table[3].float())
        for indices, outside in ((first, 4), (first, -5), (second, 3), (second, -4)):
            was = indices.clone()
            indices[1] = outside
            beside.zero_()
            with pytest.raises(IndexError, match="an index is outside of its tensor"):
                put()
            assert beside.count_nonzero() == 5  # the other value's
            indices.copy_(was)
        beside.zero_()
        first[1], second[1] = -4, -1  # counted from the end
        put()
        assert (beside[2, 2] == 1).all() and beside.count_nonzero() == 10
    finally:
        torch.set_num_threads(before)


@replayed
def test_a_uniform_outside_is_an_error():
    logits, uniforms, columns = torch.randn(2, 9), torch.rand(2, 3), torch.tensor([[0], [2]])
    draw = Replay(lambda: draw_tokens(logits, uniforms, columns))
    likeliest = Replay(lambda: draw_tokens(logits, uniforms, columns, sample=False))
    for outside in (3, -1):
        columns[1] = outside
        with pytest.raises(IndexError):
            draw()
        likeliest()  # which needs none
        assert torch.equal(likeliest.outputs[0][:, 0], logits.argmax(-1))


@replayed
def test_integers_past_what_a_float_holds():
    ids = torch.tensor([1, 2])
    replay = Replay(lambda: (ids + (2**25 + 1),))
    replay.outputs[0].zero_()
    replay()
    assert replay.outputs[0].tolist() == [2**25 + 2, 2**25 + 3]


@pytest.mark.parametrize("outside", [-1, 97, 10**6])
@pytest.mark.parametrize("sample", [True, False])
def test_late_tokens_outside_of_the_vocabulary(outside, sample):
    """A tokenizer may have more tokens than the model: they are nobody's probability."""
    logits, uniforms = torch.randn(4, 97), torch.rand(4, 3)
    columns = torch.zeros(4, 1, dtype=torch.long)

    def draw(*late):
        return draw_tokens(logits, uniforms, columns, sample=sample, late=late, late_from=2)

    for ours, wanted in zip(draw(5, outside), draw(5), strict=True):
        assert torch.equal(ours, wanted)
    if not unavailable():
        replays = [Replay(lambda late=late: draw(*late)) for late in ((5, outside), (5,))]
        assert replays[0]._program.words == replays[1]._program.words


def test_a_top_p_of_zero_keeps_the_likeliest():
    """Of equal ones the first; a row of 300 is sorted in two parts."""
    logits = torch.randn(3, 300)
    logits[0, 7] = logits[0, 200] = 9.0
    uniforms, columns = torch.tensor([[0.0], [0.5], [1 - 2**-24]]), torch.zeros(3, 1).long()
    options = {"top_p": 0.0}
    kept = filter_logprobs(torch.log_softmax(logits, -1), columns, **options)
    likeliest = [7, int(logits[1].argmax()), int(logits[2].argmax())]
    assert kept.exp().nonzero().tolist() == [[row, token] for row, token in enumerate(likeliest)]
    for sample in (True, False):
        outs = [draw_tokens(logits, uniforms, columns, sample=sample, **options)]
        if not unavailable():
            replay = Replay(
                lambda sample=sample: draw_tokens(
                    logits, uniforms, columns, sample=sample, **options
                )
            )
            replay.outputs[0].zero_()
            replay()
            outs.append(replay.outputs)
        for token, logprob, drawn in outs:
            assert token[:, 0].tolist() == likeliest
            assert drawn.abs().max() == 0.0 and (logprob < -1e-3).all()


def test_a_uniform_of_zero_draws_no_token_of_no_probability():
    logits = torch.full((1, 9), -torch.inf)
    logits[0, 5:7] = 0.0
    token, logprob, _ = draw_tokens(logits, torch.zeros(1, 1), torch.zeros(1, 1).long())
    assert token.item() == 5 and logprob.isfinite().all()


@replayed
@pytest.mark.parametrize("shared", [True, False], ids=["one mask", "a mask each"])
def test_queries_that_see_different_keys(shared):
    """Each its own range of them, none the same as the first's or the last's."""
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 11, 8)
    mask = torch.full((2, 1, 3, 11), torch.finfo(torch.float32).min)
    for query, (first, last) in enumerate([(4, 6), (1, 9), (3, 11)]):
        mask[:, :, query, first:last] = 0.0
    mask[1] = mask[1].flip(-1).flip(-2)
    if shared:
        mask = mask[:, :, 1:2].expand(2, 1, 3, 11)

    def attend():
        return (F.scaled_dot_product_attention(q, k, k, attn_mask=mask, enable_gqa=True),)

    replay = Replay(attend)
    q.copy_(torch.randn(q.shape))
    replay()
    torch.testing.assert_close(replay.outputs[0], attend()[0], rtol=1e-5, atol=2e-6)


def test_a_nucleus_that_is_reached_exactly_is_full():
    """Of four equal tokens two hold a half: the third goes."""
    logits, uniforms = torch.zeros(1, 4), torch.tensor([[1 - 2**-24]])
    columns = torch.zeros(1, 1, dtype=torch.long)

    def draw():
        return draw_tokens(logits, uniforms, columns, top_p=0.5)

    outs = [draw()]
    if not unavailable():
        replay = Replay(draw)
        replay.outputs[0].zero_()
        replay()
        outs.append(replay.outputs)
    for token, _, drawn in outs:
        assert token.item() == 1
        assert drawn.exp().item() == pytest.approx(0.5)


@replayed
def test_rounding_that_leaves_the_threshold_above_the_sum_draws_the_last_of_any_weight():
    """A large weight first, then fifteen of three quarters of its last place: added to it in
    float32 each counts as a whole, which the walk along the tokens, in float64, never reaches."""
    logits = torch.full((1, 40), -torch.inf)
    logits[0, 0] = 0.0
    logits[0, 1:16] = float(torch.tensor(0.75 * 2.0**-23, dtype=torch.float64).log())
    uniforms, columns = torch.tensor([[1.0 - 2.0**-24]]), torch.zeros(1, 1, dtype=torch.long)
    replay = Replay(lambda: draw_tokens(logits, uniforms, columns))
    replay.outputs[0].fill_(7)
    replay()
    assert replay.outputs[0].item() == 15


def test_all_but_one_are_the_likeliest():
    logits, uniforms = torch.tensor([[0.0, 0.5, -1.0, 1.0]]), torch.tensor([[1 - 2**-24]])
    columns = torch.zeros(1, 1, dtype=torch.long)

    def draw():
        return draw_tokens(logits[:, [0, 1, 3, 2]] * 1.0, uniforms, columns, top_k=3)

    outs = [draw()]
    if not unavailable():
        replay = Replay(draw)
        replay.outputs[0].zero_()
        replay()
        outs.append(replay.outputs)
    kept = torch.log_softmax(torch.tensor([0.0, 0.5, 1.0]), -1)
    for token, _, drawn in outs:
        assert token.item() == 2
        assert drawn.item() == pytest.approx(kept[2].item(), abs=1e-6)


@replayed
def test_a_layer_norm_of_nearly_equal_numbers():
    """Their variance is a tenth of eps."""
    x = 1e-3 * torch.randn(3, 40)
    replay = Replay(lambda: (F.layer_norm(x, (40,), eps=1e-5),))
    replay()
    torch.testing.assert_close(replay.outputs[0], F.layer_norm(x, (40,), eps=1e-5))
