"""Packed documents: each in its place, none seen by another, and the loss of the padded batch."""

import pytest
import torch

from hydra_rlhf import packing, sft
from hydra_rlhf.data import Preference
from hydra_rlhf.errors import UserError
from hydra_rlhf.model import HydraModel
from hydra_rlhf.pair_loss import PairLoss
from hydra_rlhf.pairs import EncodedPair, collate
from hydra_rlhf.records import Tracker
from hydra_rlhf.sft_config import SFTConfig
from tests.rlhf.families import FAMILIES, PAD, VOCAB, make_lm, make_model
from tests.rlhf.test_sft import Words, pairs, tiny_model


def padded(lengths, side="right", seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCAB, (len(lengths), max(lengths)), generator=generator)
    columns = torch.arange(max(lengths))
    sizes = torch.tensor(lengths)[:, None]
    mask = columns < sizes if side == "right" else columns >= max(lengths) - sizes
    return ids.masked_fill(~mask, PAD), mask.long()


def encoded(count, seed=0):
    """Pairs and an answer alone, of at most 8 tokens a row."""
    generator = torch.Generator().manual_seed(seed)

    def some(n):
        return torch.randint(2, VOCAB, (n,), generator=generator).tolist()

    made = [EncodedPair(some(2 + i), some(1 + i), some(4 - i), None) for i in range(count)]
    return [*made, EncodedPair(some(3), some(4), [], None)]


def test_places_by_hand():
    """Rows of 5, 2, 3 and 1 tokens: 5 fills a row, 3 and 2 another, 1 starts a third."""
    ids = torch.tensor(
        [[11, 12, 13, 14, 15], [21, 22, 0, 0, 0], [31, 32, 33, 0, 0], [41] + [0] * 4]
    )
    packed = packing.pack(ids, (ids > 0).long())
    assert packed.input_ids.tolist() == [
        [11, 12, 13, 14, 15],
        [31, 32, 33, 21, 22],
        [41, 0, 0, 0, 0],
    ]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1], [0, 0, 0, 0, 0]]
    assert packed.document.tolist() == [[0] * 5, [0, 0, 0, 1, 1], [0, -1, -1, -1, -1]]
    assert packed.place[1, :2].tolist() == [8, 9] and packed.place[2, :3].tolist() == [5, 6, 7]


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_token_is_found_where_it_was(side):
    ids, mask = padded([7, 1, 4, 4, 2, 6, 3], side)
    packed = packing.pack(ids, mask)
    assert torch.equal(packed.input_ids.flatten()[packed.place][mask.bool()], ids[mask.bool()])
    assert packed.input_ids.shape == (4, 7)  # 27 tokens
    assert len(packed.place[mask.bool()].unique()) == 27


def test_mask_by_hand():
    seen = packing.blocks(torch.tensor([[0, 0, 1, -1]]), torch.float32)[0, 0] == 0
    assert seen.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize("objective", ["hydra", "dpo"])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_sums_and_gradients_as_padded(family, objective):
    """To 1e-6 a token, adapters and all; the windows of mistral and gemma2 hold a whole row."""
    model = make_model(family, ("actor",), trained=True)
    config = SFTConfig(objective=objective, lora_r=4, rm_loss="diverged")
    loss = PairLoss(model, config, "actor")
    found = {}
    for packed in (False, True):
        batch = collate(
            encoded(3), pad=PAD, predict_both=objective == "dpo", packed=packed, side="left"
        )
        assert (batch.packed is not None) == packed
        sums = loss(batch)
        sums.pop("difference", None)
        model.zero_grad()
        sum(sums.values()).backward()
        gradients = [p.grad for p in model.adapter_parameters("actor")]
        found[packed] = {n: s.item() / len(batch.targets) for n, s in sums.items()}, gradients
    (alone, apart), (together, inside) = found[False], found[True]
    assert together == pytest.approx(alone, abs=1e-6)
    for a, b in zip(apart, inside, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(a.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_document_sees_another(family):
    """Another document in the same row: the states of its neighbour stay, bit for bit."""
    model = make_model(family, ())
    ids, mask = padded([7, 3, 4])
    before = packing.hidden(model, packing.pack(ids, mask))
    assert packing.pack(ids, mask).input_ids.shape == (2, 7)  # the last two share a row
    other = ids.clone()
    other[2, :4] = (ids[2, :4] + 5) % VOCAB
    after = packing.hidden(model, packing.pack(other, mask))
    assert torch.equal(before[1, :3], after[1, :3])
    assert not torch.allclose(before[2, :4], after[2, :4])


def test_a_step_is_the_step_of_the_padded_batch():
    """Training on packed rows, evaluation included, ends at the same weights."""
    found = []
    for packed in (False, True):
        config = SFTConfig(
            packing=packed, epochs=2, batch_size=8, micro_batch_size=4, learning_rate=1e-3
        )
        model = tiny_model()
        result = sft.train(config, model, Words(), pairs(24), Tracker(None), eval_pairs=pairs(4))
        found.append((torch.cat([p.flatten() for p in model.parameters()]), result))
    (apart, alone), (together, inside) = found
    torch.testing.assert_close(together, apart, rtol=0, atol=2e-5)
    assert inside.final == pytest.approx(alone.final, abs=1e-4)
    assert inside.tokens == alone.tokens


def test_packed_rows_hold_less_padding():
    ids, mask = padded([30, *range(1, 16)])
    packed = packing.pack(ids, mask)
    assert packed.input_ids.numel() <= 1.15 * mask.sum() < 0.4 * ids.numel()


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_keep_documents_apart(family):
    packing.check(make_model(family, ()), longest=8)


def test_models_that_cannot_are_refused(monkeypatch):
    window = make_model("mistral", ())
    with pytest.raises(UserError, match="sliding window of 8 tokens: the longest row has 9"):
        packing.check(window, longest=9)
    model = HydraModel(make_lm("llama"))
    real = model.hidden
    monkeypatch.setattr(  # a decoder that takes every token of a row for one document's
        model,
        "hidden",
        lambda ids, mask, **kwargs: real(ids, torch.ones_like(ids), role=kwargs.get("role")),
    )
    with pytest.raises(UserError, match="LlamaForCausalLM does not keep the documents"):
        packing.check(model, longest=8)
    monkeypatch.undo()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match="eager or sdpa; the model has flash_attention_2"):
        packing.check(model, longest=8)


def test_a_run_asks_before_it_starts():
    model = HydraModel(make_lm("mistral"))
    given = [Preference("3 3 3 3 3", "4 4 4", "5")]  # 9 tokens with the end
    sft.check_data(SFTConfig(), model, Words(), given)
    with pytest.raises(UserError, match="sliding window of 8 tokens: the longest row has 9"):
        sft.check_data(SFTConfig(packing=True), model, Words(), given)
