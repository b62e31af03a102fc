"""Each op in several orders of threads and blocks: the same bits, and as the reference has them."""

import pytest
import torch

from hydra_kernels import advantages, lora_linear
from hydra_kernels.backends.cuda import linear_logprob
from tests.cuda_on_cpu import device
from tests.gpu.cases import CASES, Case

SCHEDULES = [
    ("forward", 1, 1),
    ("reverse", 1, 1),
    ("forward", 8, 1),
    ("random", 1, 1),
    ("random", 4, 2),
    ("random", 16, 3),
]


def ppo_of(*size):
    case = CASES["ppo_loss"]("cpu")
    for name, t in case.inputs.items():
        new = torch.rand(size) < 0.7 if name == "mask" else 0.3 * torch.randn(size)
        case.inputs[name] = new.requires_grad_(t.requires_grad)
    return case


def tokens_of(name, *size):
    case = CASES[name]("cpu")
    for key, t in case.inputs.items():
        if t.dtype == torch.bool:
            case.inputs[key] = torch.rand(size) < 0.6
        else:
            case.inputs[key] = torch.randn(size[: t.dim()])
    return case


def run_case(case):
    return lambda backend: case.run(backend)


def run_advantages(B, T):
    mask = torch.rand(B, T) < 0.7
    given = [torch.randn(B), *(torch.randn(B, T) for _ in range(3))]

    def call(backend):
        out = advantages(*given, mask, kl_coef=0.1, gamma=0.99, estimator="k2", backend=backend)
        return [t for t in out if t is not None]

    return call


def run_decode(rows, ids):
    x = torch.randn(rows, 264).half()
    w, a, b = (torch.randn(*size).div_(16).half() for size in ((33, 264), (40, 264), (33, 40)))
    ids = torch.full((rows,), ids) if ids is not None else torch.arange(rows) % 2 - 1
    return lambda backend: [lora_linear(x, w, a, b, 0.5, adapter_ids=ids, backend=backend)]


# Rows and columns that make several blocks, segments and rounds of a block with 4 multiprocessors.
CALLS = {
    "ppo_loss": lambda: run_case(ppo_of(5, 8000)),
    "gae, a row a warp": lambda: run_case(tokens_of("gae", 9, 67)),
    "gae, segments": lambda: run_case(tokens_of("gae", 1, 19001)),
    "advantages, segments": lambda: run_advantages(2, 9100),
    "advantages, many rows": lambda: run_advantages(70, 40),
    "kl_rewards": lambda: run_case(tokens_of("kl_rewards", 3, 3000)),
    "masked_whiten": lambda: run_case(tokens_of("masked_whiten", 5, 8000)),
    "linear_logprob": lambda: run_case(CASES["linear_logprob"]("cpu")),
    "decode, mixed": lambda: run_decode(20, None),
    "decode, on": lambda: run_decode(3, 0),
    "decode, off": lambda: run_decode(32, -1),
}


@pytest.mark.parametrize("name", CALLS)
def test_order_does_not_matter(emulated_kernels, name, monkeypatch):
    call = CALLS[name]()
    if name == "linear_logprob":  # several tiles of rows and blocks of the vocabulary
        monkeypatch.setattr(linear_logprob, "ROWS", 8)
        monkeypatch.setattr(linear_logprob, "COLUMNS", 192)
    first = None
    for order, resident, seed in SCHEDULES:
        with device.installed(
            emulated_kernels, order=order, resident=resident, seed=seed
        ) as emulated:
            for _ in range(2):  # the second launch finds the first one's counters
                out = call("cuda")
                assert emulated.launches
                first = first or out
                for mine, before in zip(out, first, strict=True):
                    assert torch.equal(mine, before), (order, resident, seed)
    expected = call("reference")
    half = expected[0].dtype == torch.float16
    rtol = 4e-3 if half else 2e-4  # four roundings of a value near 1; sums of 40,000 terms
    for mine, right in zip(first, expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", ["ppo_loss", "gae", "kl_rewards", "masked_whiten"])
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_tensors_that_begin_anywhere(cuda_on_cpu, name, offset):
    """Vectors of 16 bytes only where they begin on 16 bytes: the same bits without them."""
    case = tokens_of(name, 6, 132) if name != "ppo_loss" else ppo_of(6, 132)
    expected = case.run("cuda")
    for moved in [*([key] for key in case.inputs), list(case.inputs)]:
        inputs = dict(case.inputs)
        for key in moved:
            t = case.inputs[key]
            room = torch.empty(t.numel() + 4, dtype=t.dtype)
            room[offset : offset + t.numel()] = t.detach().flatten()
            view = room[offset : offset + t.numel()].view(t.shape)
            inputs[key] = view.detach().requires_grad_(t.requires_grad)
        case_there = Case(inputs, case.differentiable, case.call, case.changes)
        for mine, right in zip(case_there.run("cuda"), expected, strict=True):
            assert torch.equal(mine, right), moved


def test_a_failure_is_the_product_s_own_error(emulated_kernels):
    """A tensor that the kernel may not touch: an error with the line of csrc, not a crash."""
    with device.installed(emulated_kernels) as emulated:
        emulated.allow = lambda t: None
        call = CALLS["masked_whiten"]()
        with pytest.raises(RuntimeError, match=r"masked_whiten: CUDA error: .* outside of every"):
            call("cuda")
    with device.installed(emulated_kernels):
        call("cuda")  # nothing is left of it


def test_nothing_is_left_behind(emulated_kernels):
    from hydra_kernels import available_backends

    before = available_backends("gae"), torch.Tensor.data_ptr, torch.mm
    with device.installed(emulated_kernels):
        assert "cuda" in available_backends("gae")
    assert (available_backends("gae"), torch.Tensor.data_ptr, torch.mm) == before
