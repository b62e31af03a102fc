"""Elements, rows and matrices that indices choose: tables, the largest, mixtures of experts."""

import pytest
import torch
from torch import Tensor

from hydra_kernels.replay import NotReplayable, Replay, unavailable
from tests.replay.test_replay import check, rows

pytestmark = pytest.mark.skipif(bool(unavailable()), reason="the C++ extension is not built")


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def ids(*shape: int, below: int) -> Tensor:
    return torch.randint(below, shape)


PICKS = {
    "a row each": lambda t, i: t[i[:, 0]],
    "rows for a matrix of ids": lambda t, i: t[i],
    "columns": lambda t, i: t[:, i[0]],
    "columns from the end": lambda t, i: t[:, i[0] - 6],
    "a list of its own": lambda t, i: t.view(5, 2, 3)[:, :, [-2]] * 1.0,
    "along rows": lambda t, i: t.gather(0, i),
    "along columns of a view": lambda t, i: t.t().gather(1, i[:, :4]),
    "fewer columns": lambda t, i: t.gather(0, i[:, :2]),
    "by index_select": lambda t, i: t.index_select(1, i[0]),
}


@pytest.mark.parametrize("name", PICKS)
def test_picks(name):
    check(PICKS[name], rows(5, 6), ids(4, 5, below=5))


def test_picks_of_bfloat16():
    table = rows(5, 6).bfloat16()
    check(lambda i: table[i].float() * 2.0, ids(3, 2, below=5))


def test_a_pick_outside_is_an_error_and_writes_nothing():
    table, index = rows(5, 6), torch.tensor([[1], [4]])
    replay = Replay(lambda: (table.gather(0, index),))
    for wrong in (5, -6):
        index[0] = wrong
        replay.outputs[0].fill_(7.0)
        with pytest.raises(IndexError, match="outside of its tensor"):
            replay()
        assert replay.outputs[0].tolist() == [[7.0], [table[4, 0]]]


def test_the_largest():
    check(lambda x: x.topk(3), rows(7, 40))
    check(lambda x: x.topk(1, dim=2), rows(3, 5, 4).transpose(1, 2))
    check(lambda x: tuple(x.max(dim=-1)), rows(4, 9))
    check(lambda x: (x.max(dim=-1, keepdim=True).values, x.amax(-1)), rows(4, 9))
    check(lambda x: x.topk(6), rows(2, 6))


def test_of_equal_ones_the_first_and_nan_before_all():
    x = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0], [1.0, 2.0, float("nan"), 5.0, 0.0]])
    replay = Replay(lambda: tuple(x.topk(3)))
    replay()
    values, index = replay.outputs
    assert index.tolist() == [[1, 2, 4], [2, 3, 1]]
    assert values[0].tolist() == [3.0, 3.0, 3.0] and values[1, 1:].tolist() == [5.0, 2.0]


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("keepdim", [False, True])
def test_sums(dim, keepdim):
    check(lambda x: x.sum(dim, keepdim=keepdim), rows(3, 5, 37))
    check(lambda x: (2 * x).sum(dim, keepdim=keepdim), rows(2, 1, 4))


def test_put_together():
    check(lambda x, y: torch.stack([x, -y], -1).flatten(-2), rows(3, 4), rows(3, 4))
    check(lambda x, y: torch.stack([x, y]), rows(3, 4), rows(4, 3).t())
    check(lambda x: x.repeat(2, 1, 3), rows(4, 5))
    check(lambda x: x.t().repeat(3, 2), rows(4, 5))
    check(lambda i: i.repeat(1, 2) + 1, ids(3, 2, below=9))


def test_bounds():
    check(lambda x: x.clamp(-0.5, 0.25), rows(3, 37))
    check(lambda x: (x.clamp(min=0.1), x.clamp(max=0.1)), rows(3, 37))
    check(lambda x, y: (torch.maximum(x, y), torch.minimum(x, y)), rows(3, 37), rows(37))
    x = torch.tensor([float("nan"), -3.0, 3.0])
    replay = Replay(lambda: (x.clamp(-1.0, 1.0), torch.minimum(x[2:], x), torch.maximum(x[:1], x)))
    replay()
    assert replay.outputs[0].tolist()[1:] == [-1.0, 1.0] and replay.outputs[0][0].isnan()
    assert replay.outputs[1].tolist()[1:] == [-3.0, 3.0] and replay.outputs[1][0].isnan()
    assert replay.outputs[2].isnan().all()


def test_in_place():
    def function(x, y):
        z = x * 2.0
        z += y
        z[:, :2].mul_(3.0)
        z /= 2.0
        z.sub_(y)
        return z + 0.0

    check(function, rows(3, 5), rows(5))


def test_a_safe_softmax_of_nothing_is_nothing():
    x = rows(3, 5)
    replay = Replay(lambda: (torch.ops.aten._safe_softmax(x, -1),))
    x[1] = -torch.inf
    x[2, 1:] = -torch.inf
    replay()
    torch.testing.assert_close(replay.outputs[0][0], x[0].softmax(-1))
    assert replay.outputs[0][1:].tolist() == [[0.0] * 5, [1.0, 0.0, 0.0, 0.0, 0.0]]


def by_number(x: Tensor, matrices: Tensor, numbers: Tensor) -> Tensor:
    return torch.bmm(matrices[numbers], x.unsqueeze(-1)).squeeze(-1)


def by_number_transposed(x: Tensor, matrices: Tensor, numbers: Tensor) -> Tensor:
    return torch.bmm(x.unsqueeze(1), matrices[numbers]).squeeze(1)


@pytest.mark.parametrize(
    "S, E, N, K", [(1, 1, 1, 1), (6, 4, 37, 19), (9, 3, 5, 64), (2, 8, 96, 33)]
)
def test_experts(S, E, N, K, threads):
    """Rows of one expert apart from each other, experts without a row."""
    numbers = ids(S, below=E)
    replay = check(by_number, rows(S, K), rows(E, N, K), numbers, rtol=1e-4, atol=1e-4)
    assert len(replay) == 1
    check(by_number_transposed, rows(S, K), rows(E, K, N), numbers, rtol=1e-4, atol=1e-4)


def test_experts_of_bfloat16(threads):
    matrices = rows(3, 20, 33).bfloat16()
    numbers = torch.tensor([2, 0, 2, 2])
    x = rows(4, 33).bfloat16()
    replay = Replay(lambda: (by_number(x, matrices, numbers).float(),))
    x.copy_(rows(4, 33))
    numbers.copy_(torch.tensor([1, 1, 0, 1]))
    replay()
    exact = by_number(x.float(), matrices.float(), numbers)
    torch.testing.assert_close(replay.outputs[0], exact, rtol=1e-5, atol=1e-4)


def test_an_expert_that_is_not_there_is_an_error():
    x, matrices, numbers = rows(3, 4), rows(2, 5, 4), torch.tensor([1, 0, 1])
    replay = Replay(lambda: (by_number(x, matrices, numbers),))
    for wrong in (2, -1):
        numbers[1] = wrong
        with pytest.raises(IndexError):
            replay()


def test_experts_are_read_where_they_lie():
    """Nothing of their size is held; weights changed in place are seen."""
    x, matrices, numbers = rows(4, 64), rows(8, 64, 64), ids(4, below=8)
    replay = Replay(lambda: (by_number(x, matrices, numbers) * 1.0,))
    assert replay.nbytes <= 2 * x.nbytes
    matrices.mul_(-2.0)
    replay()
    torch.testing.assert_close(
        replay.outputs[0], by_number(x, matrices, numbers), rtol=1e-4, atol=1e-4
    )


def changed_after(write):
    matrices, numbers = rows(3, 5, 4), torch.tensor([1, 0, 1])

    def function(x):
        taken = matrices[numbers]
        write(matrices, numbers, taken)
        return torch.bmm(taken, x.unsqueeze(-1))

    return function


MATRICES = rows(4, 5, 4)


def cast_and_written(x):
    half = (x * 2.0).bfloat16()
    wide = half.float()
    half.add_(1.0)
    return wide * 1.0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (changed_after(lambda m, i, t: m.mul_(2.0)), "read later as it was"),
        (changed_after(lambda m, i, t: t.mul_(2.0)), "for more than a product"),
        (lambda x: MATRICES[[0, 1]] * 2.0, "for more than a product"),
        (lambda x: torch.bmm(MATRICES[[0, 1, 2]], MATRICES[1:, 1:, :2]), "more than a row each"),
        (lambda x: torch.bmm(MATRICES[[0, 1, 2]][:, :2], MATRICES[1:, 1:, :1]), "a part of"),
        (lambda x: x[[0, 1], [1, 2]] * 1.0, "other than one list"),
        (lambda x: x[x > 0.0] * 1.0, "other than one list|aten.gt"),
        (lambda x: x.topk(2, dim=0)[0], "2 largest over dimension 0"),
        (lambda x: x.topk(2, largest=False)[0], "2 largest"),
        (lambda x: x.max(0).values, r"largest over dimensions \[0\]"),
        (lambda x: x.amax(), r"largest over dimensions \[\]"),
        (lambda x: x.sum((0, 1)), "a sum over dimensions"),
        (lambda x: torch.zeros(3, 4).add_(x) * 1.0, "to a constant"),
        (cast_and_written, "read later as it was"),
    ],
)
def test_refuses_by_name(function, message):
    x = rows(3, 4)
    with pytest.raises(NotReplayable, match=message):
        Replay(lambda: (function(x),))


def test_casts_are_no_instructions():
    weight = rows(6, 4)

    def function(x):
        half = (x * 2.0).bfloat16()
        return torch.mm(half, weight.bfloat16().t()).float()[1:] * 3.0

    x = rows(5, 4)
    replay = Replay(lambda: (function(x),))
    assert len(replay) == 3
    x.copy_(rows(5, 4))
    weight.copy_(rows(6, 4))
    replay()
    exact = torch.mm(x * 2.0, weight.t())[1:] * 3.0
    torch.testing.assert_close(replay.outputs[0], exact, rtol=1e-5, atol=1e-4)


def test_a_cast_of_a_part_is_that_part():
    x = rows(3, 8)
    replay = Replay(lambda: ((x[1:, 2:5] * 1.0).bfloat16()[1:, 1:].float() + 0.5,))
    replay()
    torch.testing.assert_close(replay.outputs[0], x[2:, 3:5] + 0.5)
    replay = Replay(lambda: (x[1:].bfloat16()[1:, 1:].float() + 0.5,))
    replay()
    torch.testing.assert_close(replay.outputs[0], x[2:, 1:] + 0.5)
