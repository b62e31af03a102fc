"""What the emulator says about kernels with one mistake each, and about the same without it."""

import ctypes
import re

import pytest
import torch

from tests.cuda_on_cpu import build

SCHEDULES = [("forward", 1), ("reverse", 1), ("random", 3)]

# Of probes.cu: (kernel, blocks, threads, what is said about it)
RIGHT = [
    ("neighbour", 2, 64),
    ("rounds", 2, 64),
    ("lanes", 1, 32),
    ("same value", 1, 64),
    ("vector", 1, 64),
    ("last block", 5, 64),
    ("wait", 9, 32),
    ("bound", 1, 64),
]
WRONG = [
    ("neighbour, no barrier", 1, 64, "race: read of __shared__ values|which no thread has written"),
    ("rounds, one barrier", 1, 64, "race: .* of __shared__ value"),
    ("lanes, in lockstep", 1, 32, "race: read of __shared__ values|which no thread has written"),
    ("other value", 1, 64, "race: write of __shared__ which"),
    ("barrier in a branch", 1, 64, "diverged barrier"),
    ("early exit", 1, 64, "diverged barrier: block 0 thread .* ended"),
    ("shuffle in a branch", 1, 64, "diverged warp|deadlock"),
    ("shuffle from outside", 1, 32, "a lane that its mask leaves out"),
    ("never written", 1, 64, "read of __shared__ values . 28 by .* no thread has written"),
    ("past an array", 1, 64, "index past the end of an array"),
    ("past the end", 1, 64, r"write of 4 bytes .*\(0 bytes past the end of tensor 0"),
    ("ahead of the start", 1, 64, r"write of 4 bytes .*\(4 bytes ahead of tensor 0"),
    ("read past the end", 1, 64, r"read of 4 bytes .*\(0 bytes past the end of tensor 0"),
    ("misaligned vector", 1, 64, "misaligned"),
    ("two blocks", 2, 32, "race: write of byte 0 of tensor 0"),
    ("no release", 5, 64, "race: read of byte .* with a write by block"),
    ("no acquire", 5, 64, "race: read of byte .* with a write by block"),
    ("wait for later", 9, 32, "waits for something that no resident block will do"),
    ("read-only", 1, 64, "read-only cache"),
    ("bound", 1, 96, "96 threads in a block of a kernel that is bound to 64"),
    ("bound", 1, 2048, "2048 threads in a block"),
    ("bound", 0, 64, "a grid of 0"),
]


@pytest.fixture(scope="module")
def probes():
    if build.missing():
        pytest.skip(f"the kernels are compiled for the CPU here: {build.missing()}")
    path = build.build(extra={"probes.cu": (build.HERE / "probes.cu").read_text()})
    library = ctypes.CDLL(str(path))
    library.probe.restype = library.probe_mma.restype = ctypes.c_char_p
    return build.load(path), library


def address(t):
    return ctypes.c_void_p(t.data_ptr())


def said(probes, name, blocks, threads, order, resident, seed=1):
    module, library = probes
    out = torch.zeros(64)
    module.configure(order=order, seed=seed, resident=resident, multiprocessors=1)
    module.set_buffers([(out.data_ptr(), 256, 4)])
    return library.probe(name.encode(), address(out), blocks, threads).decode(), out


@pytest.mark.parametrize("order, resident", SCHEDULES)
@pytest.mark.parametrize("name, blocks, threads", RIGHT)
def test_says_nothing_about_a_right_kernel(probes, name, blocks, threads, order, resident):
    for seed in range(3):
        assert said(probes, name, blocks, threads, order, resident, seed)[0] == ""


@pytest.mark.parametrize("order, resident", SCHEDULES)
@pytest.mark.parametrize("name, blocks, threads, message", WRONG)
def test_finds(probes, name, blocks, threads, message, order, resident):
    text = said(probes, name, blocks, threads, order, resident)[0]
    assert re.search(message, text), text


def test_the_last_block_sees_all(probes):
    for order, resident in SCHEDULES:
        assert said(probes, "last block", 7, 64, order, resident)[1][62] == 7


def test_shuffles_and_votes(probes):
    text, out = said(probes, "shuffles", 1, 64, "random", 1)
    assert text == ""
    for x in range(64):
        warp, lane = x // 32 * 32, x % 32
        up = warp + (lane - 3 if lane >= 3 else lane)
        down = x + 2 if lane % 8 + 2 < 8 else x
        total = (((warp + 5) * 64 + up) * 64 + (x ^ 9)) * 64 + down
        third = sum(y % 3 == 0 for y in range(warp, warp + 32))
        assert out[x] == total % 8388608 + third + (warp == 32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mma_is_the_matrix_product(probes, dtype):
    module, library = probes
    # Small integers: every product and sum is exact, in any order.
    a, b = torch.randint(-8, 9, (16, 16)).to(dtype), torch.randint(-8, 9, (16, 8)).to(dtype)
    c, d = torch.randint(-99, 99, (16, 8)).float(), torch.full((16, 8), torch.nan)
    module.configure(order="random", seed=2, resident=1, multiprocessors=1)
    module.set_buffers([(t.data_ptr(), t.nbytes, t.element_size()) for t in (a, b, c, d)])
    text = library.probe_mma(int(dtype == torch.float16), *(address(t) for t in (a, b, c, d)))
    assert text == b""
    assert torch.equal(d, a.float() @ b.float() + c)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounds_as_torch_does(probes, dtype):
    """Every value of the type, halfway to the next, a little to both sides, and random bits."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite()].float()
    bits = values.view(torch.int32)
    step = 2**12 if dtype == torch.float16 else 2**15
    near = [(bits + d).view(torch.float32) for d in (0, step, step - 1, step + 1)]
    rest = torch.randint(-(2**31), 2**31, (100000,)).to(torch.int32).view(torch.float32)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65519.9, 65520.0, 1e-8])
    x = torch.cat([*near, rest, special, values / 3, torch.randn(1000) * 1e-7])
    out = torch.empty(len(x), dtype=torch.int16)
    back = torch.empty(len(x))
    is_half = int(dtype == torch.float16)
    probes[1].probe_round(is_half, address(x), address(out), address(back), ctypes.c_int64(len(x)))
    expected = x.to(dtype)
    nan = x.isnan()
    assert torch.equal(out.view(dtype).isnan(), nan)
    assert torch.equal(out[~nan], expected.view(torch.int16)[~nan])
    assert torch.equal(back[~nan], expected.float()[~nan])
