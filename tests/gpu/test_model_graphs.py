"""HydraModel in a captured CUDA graph: a replay obeys the ids, tokens and weights that it finds.

On a CPU, where nothing is captured, the same bodies run with a plain call in place of the replay:
they show that the cases do change, and that the comparison can fail.
"""

import pytest
import torch

from benchmarks.measure import graphed
from tests.rlhf.families import THREE, batch, make_model, train_by_chance

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ROLES = ("actor", "critic", "reference")
# Sums may be split otherwise while they are captured.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class Passes:
    """Log-probabilities, values and every adapter's gradients of one pass, ids a tensor (B,)."""

    def __init__(self, family: str, device: str, recompute: bool):
        self.model = make_model(family, trained=True).to(device)
        if recompute:
            self.model.gradient_checkpointing_enable()
        self.ids, self.mask, self.response_mask = (t.to(device) for t in batch())
        self.adapters = torch.zeros(len(self.ids), dtype=torch.long, device=device)
        self.trained = [p for a in ("actor", "critic") for p in self.model.adapter_parameters(a)]

    def __call__(self) -> tuple[torch.Tensor, ...]:
        model, T = self.model, self.response_mask.shape[1]
        with model.no_dropout():
            hidden = model.hidden(self.ids, self.mask, adapter_ids=self.adapters)
        states = hidden[:, -T - 1 : -1]
        targets = self.ids[:, -T:].masked_fill(~self.response_mask, -100)
        logprobs = model.lm_head.logprob(states, targets).logprobs
        values = torch.where(self.response_mask, model._head("value", states), 0.0)
        loss = (logprobs * logprobs.detach().cos()).sum() + values.square().sum()
        gradients = torch.autograd.grad(loss, self.trained)
        return logprobs.detach(), values.detach(), *gradients

    def of_role(self, role: str) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            out = [
                self.model.score(self.ids, self.mask, self.response_mask, roles=(head,))
                for head in ("actor", "critic")
            ]
            del out  # the passes of others in between leave nothing behind
            hidden = self.model.hidden(self.ids, self.mask, role=role)
            T = self.response_mask.shape[1]
            targets = self.ids[:, -T:].masked_fill(~self.response_mask, -100)
            states = hidden[:, -T - 1 : -1]
            values = torch.where(self.response_mask, self.model._head("value", states), 0.0)
            return self.model.lm_head.logprob(states, targets).logprobs, values


def replayable(call, device):
    replay = graphed(call) if device == "cuda" else call
    return lambda: [t.clone() for t in replay()]


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", THREE)
def test_one_graph_serves_every_role(family, device, recompute):
    """Ids written into their tensor choose the adapter, of the whole batch or of each row."""
    passes = Passes(family, device, recompute)
    replay = replayable(passes, device)
    half = len(passes.trained) // 2
    seen = []
    for role in (*ROLES, "actor"):
        passes.adapters.fill_(passes.model.adapter_id(role))
        logprobs, values, *gradients = replay()
        expected = passes.of_role(role)
        torch.testing.assert_close(logprobs, expected[0], **CLOSE)
        torch.testing.assert_close(values, expected[1], **CLOSE)
        for mine, part in (("actor", gradients[:half]), ("critic", gradients[half:])):
            assert any(bool(g.any()) for g in part) == (role == mine)
        seen.append(logprobs)
    assert torch.equal(seen[0], seen[3]) and not torch.allclose(seen[0], seen[1], atol=1e-3)
    rows = [passes.model.adapter_id(role) for role in (*ROLES, "critic")]
    passes.adapters.copy_(torch.tensor(rows))
    logprobs = replay()[0]
    for row, expected in enumerate((*seen[:3], seen[1])):
        torch.testing.assert_close(logprobs[row], expected[row], **CLOSE)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", THREE)
def test_a_replay_sees_new_tokens_and_an_optimizers_step(family, device):
    passes = Passes(family, device, recompute=False)
    replay = replayable(passes, device)
    before = replay()
    with torch.no_grad():
        passes.ids.copy_((passes.ids + 5) % 90 + 2)
    moved = replay()
    assert not torch.equal(moved[0], before[0])
    for a, b in zip(moved, passes(), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    train_by_chance(passes.model, scale=0.2)
    after = replay()
    assert not torch.equal(after[0], moved[0])
    for a, b in zip(after, passes(), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
