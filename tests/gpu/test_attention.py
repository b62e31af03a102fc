"""Attention over padded batches: finite, and by kernels whose gradients are."""

import pytest
import torch

from hydra_rlhf.attention import without_cudnn
from tests.rlhf.families import make_model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def cudnn():
    """As a process starts: on, and nobody has asked."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    without_cudnn.cache_clear()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield torch.backends.cuda.cudnn_sdp_enabled
    torch.backends.cuda.enable_cudnn_sdp(before)


def test_a_model_leaves_cudnn_out_once(cudnn):
    make_model("llama")
    assert not cudnn()
    torch.backends.cuda.enable_cudnn_sdp(True)  # by a user who knows
    make_model("llama")
    assert cudnn()


@pytest.mark.parametrize("length", [64, 128, 192])  # 64 past 128 is where cuDNN's gave NaN
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("device", DEVICES)
def test_left_padding_leaves_no_nan(device, dtype, length):
    """In no row's log-probabilities and in no adapter's gradient."""
    model = make_model("llama", trained=True)
    model.base.to(dtype)  # the heads stay float32
    model.to(device)
    ids = torch.randint(3, 90, (3, length), device=device)
    mask = torch.ones_like(ids)
    mask[0, : length // 2] = 0
    mask[1, :-10] = 0
    response = mask.bool()[:, -16:]
    score = model.score(ids, mask, response, roles=("actor", "critic"))
    assert score.logprobs.isfinite().all() and score.values.isfinite().all()
    (score.logprobs.sum() + score.values.sum()).backward()
    for adapter in ("actor", "critic"):
        gradients = [p.grad for p in model.adapter_parameters(adapter)]
        assert all(g.isfinite().all() for g in gradients) and any(g.any() for g in gradients)
