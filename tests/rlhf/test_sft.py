"""Hydra-SFT: its batches, its losses by hand, and training that means what it says."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hydra_rlhf import sft
from hydra_rlhf.commands.sft import add_lora
from hydra_rlhf.data import Preference
from hydra_rlhf.data.bundled import build_tokenizer
from hydra_rlhf.data.dialogue import Dialogue
from hydra_rlhf.errors import UserError
from hydra_rlhf.model import HydraModel
from hydra_rlhf.pair_loss import PairLoss, calibration_error, reward_losses
from hydra_rlhf.pairs import EncodedPair, batches, collate, encode_pairs, mix
from hydra_rlhf.records import Tracker
from hydra_rlhf.sft import merge_adapter
from hydra_rlhf.sft_config import SFTConfig

SHORT = EncodedPair([5, 6], [7, 8, 2], [7, 9, 10, 2], None)
LONG = EncodedPair([5, 6, 11, 12], [13, 2], [14, 15, 2], 0.5)


def tiny_model(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=31,  # a prime
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = HydraModel(LlamaForCausalLM(config))
    torch.nn.init.normal_(model.reward_head.weight, std=0.3)
    return model.train()


class Words:
    """A tokenizer of space-separated numbers."""

    eos_token_id, pad_token_id, padding_side = 2, 0, "right"

    def __call__(self, texts, add_special_tokens=True):
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}

    def decode(self, ids):
        return " ".join(map(str, ids))


def pairs(count):
    generator = torch.Generator().manual_seed(1)

    def words(low, high):
        length = int(torch.randint(low, high, (), generator=generator))
        return " ".join(map(str, torch.randint(3, 31, (length,), generator=generator).tolist()))

    return [Preference(words(2, 5), words(1, 7), words(1, 7)) for _ in range(count)]


# Batches


def test_a_response_ends_with_eos_and_is_cut_to_fit():
    encoded = encode_pairs(Words(), [Preference("5 6", "7 8", "9 10 11 12")], max_length=5)
    assert encoded == [EncodedPair([5, 6], [7, 8, 2], [9, 10, 11], None)]


def test_an_end_that_a_chat_template_wrote_is_the_only_one():
    """The reward head is trained where PPO reads it: at the first eos after the answer."""
    tokenizer = build_tokenizer(["Is it warm? Yes. No, go away."], 300)
    end = "{{ m['content'] }}</s>\n"
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>" + end + "{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    turns = [{"role": "user", "content": "Is it warm?"}]
    answers = [
        [{"role": "assistant", "content": "Yes."}],
        [{"role": "assistant", "content": "No."}, *turns, {"role": "assistant", "content": "No."}],
    ]
    prompt, (chosen, rejected) = Dialogue(tokenizer).render(turns, answers)
    assert chosen == "Yes.</s>\n" and rejected.count("</s>") == 3
    (pair,) = encode_pairs(tokenizer, [Preference(prompt, chosen, rejected)], max_length=99)
    eos = tokenizer.eos_token_id
    assert pair.chosen == [*tokenizer("Yes.")["input_ids"], eos]
    assert pair.rejected.count(eos) == 3 and pair.rejected[-1] == eos != pair.rejected[-2]
    # In the middle alone it does not end the answer.
    (pair,) = encode_pairs(tokenizer, [Preference("Is", " it</s> warm", "")], max_length=99)
    assert pair.chosen.count(eos) == 2 and pair.chosen[-1] == eos
    assert pair.rejected == [eos]


@pytest.mark.parametrize(
    ("given", "max_length", "message"),
    [
        ([], 8, "is empty"),
        ([Preference("5 6 7 8", "9", "10")], 4, "prompt of pair 1 has 4 tokens"),
    ],
)
def test_pairs_that_cannot_be_trained_on(given, max_length, message):
    with pytest.raises(UserError, match=message):
        encode_pairs(Words(), given, max_length=max_length)


@pytest.mark.parametrize("side", ["left", "right"])
def test_collate_by_hand(side):
    batch = collate([SHORT], pad=0, side=side)
    pad_left = 1 if side == "left" else 0  # the chosen row is one shorter than the rejected
    assert batch.input_ids[1].tolist() == [5, 6, 7, 9, 10, 2]
    assert batch.attention_mask.sum(1).tolist() == [5, 6]
    assert batch.start.tolist() == [2 + pad_left, 2]
    assert batch.last.tolist() == [4 + pad_left, 5]
    assert batch.positions.tolist() == [1 + pad_left, 2 + pad_left, 3 + pad_left]
    assert batch.targets.tolist() == [7, 8, 2]
    assert batch.diverge.tolist() == [1]


def test_sft_needs_no_rejected_rows():
    assert collate([SHORT, LONG], pad=0, both=False).input_ids.shape[0] == 2


def test_an_epoch_has_every_pair_once_whatever_the_order():
    encoded = [EncodedPair([5], [6] * n, [7], None) for n in range(1, 101)]
    for group in (True, False):
        made = batches(encoded, 8, seed=3, group_by_length=group)
        assert sorted(len(p.chosen) for b in made for p in b) == list(range(1, 101))
        assert made == batches(encoded, 8, seed=3, group_by_length=group)
        assert made != batches(encoded, 8, seed=4, group_by_length=group)


def test_grouping_by_length_saves_padding():
    encoded = [EncodedPair([5], [6] * (1 + n * 37 % 50), [7], None) for n in range(400)]

    def padding(group):
        made = batches(encoded, 8, seed=0, group_by_length=group)
        return sum(max(map(len, b)) - len(p) for b in made for p in b)

    assert padding(True) < 0.2 * padding(False)


# Losses


def test_a_tie_is_ranked_by_chance():
    """So a reward head of zeros begins at an accuracy of one half."""
    batch = collate([SHORT, LONG], pad=0)
    rewards = torch.zeros(batch.input_ids.shape)
    assert reward_losses(rewards, batch, SFTConfig())["correct"] == 1.0
    rewards[0, batch.last[0]] = 0.1  # the first pair's better answer
    assert reward_losses(rewards, batch, SFTConfig())["correct"] == 1.5
    rewards[0, batch.last[0]] = -0.1
    assert reward_losses(rewards, batch, SFTConfig())["correct"] == 0.5


def test_reward_loss_at_the_last_token_by_hand():
    """r_w = 2, r_l = 0.5: -log sigmoid(1.5) = 0.2014; with margin 0.5, -log sigmoid(1) = 0.3133."""
    batch = collate([SHORT], pad=0)
    rewards = torch.zeros(2, 6)
    rewards[0, 4], rewards[1, 5] = 2.0, 0.5
    losses = reward_losses(rewards, batch, SFTConfig())
    assert losses["rm"].item() == pytest.approx(0.20141, abs=1e-5)
    assert losses["center"].item() == pytest.approx(6.25)
    assert losses["correct"].item() == 1.0
    assert losses["difference"].tolist() == [1.5]
    with_margin = batch._replace(margin=torch.tensor([0.5]))
    losses = reward_losses(rewards, with_margin, SFTConfig())
    assert losses["rm"].item() == pytest.approx(0.31326, abs=1e-5)
    losses = reward_losses(rewards, with_margin, SFTConfig(use_margins=False))
    assert losses["rm"].item() == pytest.approx(0.20141, abs=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_reward_loss_after_divergence_by_hand(side):
    """They differ from the second response token on; the shorter keeps its last reward.

    chosen 8 2 (2) against rejected 9 10 2: differences 1, 2, 3 - wherever the rows begin.
    """
    batch = collate([SHORT], pad=0, side=side)
    rewards = torch.full((2, 6), 100.0)  # what stands elsewhere must not matter
    first = batch.start[0]
    rewards[0, first + 1], rewards[0, first + 2] = 1.0, 3.0
    rewards[1, 3:6] = torch.tensor([0.0, 1.0, 0.0])
    losses = reward_losses(rewards, batch, SFTConfig(rm_loss="diverged"))
    expected = sum(math.log1p(math.exp(-d)) for d in (1.0, 2.0, 3.0)) / 3
    assert losses["rm"].item() == pytest.approx(expected, abs=1e-6)


def test_loss_is_that_of_logits_and_of_transformers():
    """L_SFT against transformers' own loss on the chosen row, L_RM against the hidden state."""
    model = tiny_model().eval()
    batch = collate([LONG], pad=0)
    sums = PairLoss(model, SFTConfig(), None)(batch)
    ids = torch.tensor([LONG.prompt + LONG.chosen])
    labels = ids.clone()
    labels[:, : len(LONG.prompt)] = -100
    out = model.causal_lm(ids, labels=labels, output_hidden_states=True)
    torch.testing.assert_close(sums["sft"] / 2, out.loss)
    reward = model.reward_head(out.hidden_states[-1][0, -1])
    rejected = torch.tensor([LONG.prompt + LONG.rejected])
    state = model.causal_lm(rejected, output_hidden_states=True).hidden_states[-1][0, -1]
    torch.testing.assert_close(sums["difference"], reward - model.reward_head(state))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    model = tiny_model().eval()
    loss = PairLoss(model, SFTConfig(rm_loss="diverged"), None)
    together = loss(collate([SHORT, LONG], pad=0, side=side))
    alone = [loss(collate([pair], pad=0)) for pair in (SHORT, LONG)]
    for name in ("sft", "rm", "center"):
        torch.testing.assert_close(together[name], alone[0][name] + alone[1][name])


def test_answers_without_a_pair_count_for_the_text_alone():
    """In one batch with a pair: the sums of each apart, wherever they stand."""
    model = tiny_model().eval()
    alone = EncodedPair([9, 10, 11], [12, 13, 2], [], None)
    loss = PairLoss(model, SFTConfig(), None)
    pair = loss(collate([SHORT], pad=0))
    text = PairLoss(model, SFTConfig(objective="sft"), None)(collate([alone], pad=0))
    for order in ([alone, SHORT], [SHORT, alone]):
        both = loss(collate(order, pad=0))
        torch.testing.assert_close(both["sft"], pair["sft"] + text["sft"])
        torch.testing.assert_close(both["rm"], pair["rm"])
        assert both["difference"].shape == (1,)


def test_mix_by_hand():
    """A share of 0.25 beside 6 pairs is 2 of 8; 0.5 repeats 4 answers to make 6."""
    some = [EncodedPair([5], [6], [n], None) for n in range(3, 9)]
    alone = [EncodedPair([5], [n], [], None) for n in range(20, 24)]
    assert len(mix(some, alone, None, seed=0)) == 10
    assert len(mix(some, alone, 0.25, seed=0)) == 8
    repeated = mix(some, alone, 0.5, seed=0)
    assert len(repeated) == 12 and all(one in repeated for one in alone)


def test_calibration_by_hand():
    """Stated sigmoid(0) = 0.5 and half of them right: 0. Sure and wrong: 1."""
    assert calibration_error(torch.tensor([1e-9, -1e-9])) == pytest.approx(0.0, abs=1e-6)
    assert calibration_error(torch.tensor([-50.0, -50.0])) == pytest.approx(1.0)
    assert calibration_error(torch.tensor([50.0, -50.0])) == pytest.approx(0.5)
    # 0.52 and 0.58 are in the first and the second of ten bins above 0.5.
    apart = torch.logit(torch.tensor([0.52, 0.58])) * torch.tensor([1.0, -1.0])
    assert calibration_error(apart) == pytest.approx((0.48 + 0.58) / 2, abs=1e-5)


# Training


def trained(config, given, *, model=None, side="right"):
    model = model or tiny_model()
    tokenizer = Words()
    tokenizer.padding_side = side
    result = sft.train(config, model, tokenizer, given, Tracker(None), eval_pairs=given)
    return model, result


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("objective", ["hydra", "rm", "rrhf", "sft"])
def test_pairs_without_a_preference_are_told_of(objective, caplog):
    """Two that say the same, and one whose answers differ beyond the context alone."""
    given = [*pairs(5), Preference("5", "6 7", "6 7"), Preference("5", "8", "8")]
    given.append(Preference("5", "9 " * 31 + "3", "9 " * 31 + "4"))
    config = SFTConfig(objective=objective, max_steps=1, batch_size=2)
    with caplog.at_level("WARNING", logger="hydra_rlhf"):
        sft.train(config, tiny_model(), Words(), given[:5], Tracker(None))
        assert "chosen and rejected" not in caplog.text
        sft.train(config, tiny_model(), Words(), given, Tracker(None))
    assert ("3 of 8 pairs have the same answer" in caplog.text) == (objective != "sft")


def test_accumulation_is_exact():
    """Microbatches of unequal token counts give the step of the whole batch."""
    given = pairs(12)
    settings = {"batch_size": 12, "max_steps": 3, "learning_rate": 1e-2, "center_rewards": 0.1}
    whole, _ = trained(SFTConfig(**settings), given)
    pieces, _ = trained(SFTConfig(**settings, micro_batch_size=5), given)
    torch.testing.assert_close(weights(pieces), weights(whole), atol=2e-5, rtol=0)
    assert not torch.allclose(weights(whole), weights(tiny_model()), atol=1e-3)


def test_progress_shows_the_speed():
    figures = {"loss": 1.5, "grad_norm": 0.1, "tokens_per_s": 900.0}
    assert sft._to_show(SFTConfig(), figures) == {"loss": 1.5, "tokens/s": 900.0}


def test_same_seed_same_weights():
    config = SFTConfig(batch_size=4, epochs=2, learning_rate=1e-2)
    first, _ = trained(config, pairs(9))
    second, _ = trained(config, pairs(9))
    assert torch.equal(weights(first), weights(second))


@pytest.mark.parametrize("objective", ["sft", "rm", "hydra"])
def test_each_objective_learns_what_it_says(objective):
    given = pairs(16)
    before = tiny_model()
    start = trained(SFTConfig(objective=objective, max_steps=1, learning_rate=1e-9), given)[1].final
    model, result = trained(
        SFTConfig(objective=objective, epochs=30, batch_size=8, gamma=1.0, learning_rate=1e-2),
        given,
    )
    head_moved = not torch.equal(model.reward_head.weight, before.reward_head.weight)
    assert head_moved == (objective != "sft")
    if objective != "rm":
        assert result.final["sft_loss"] < 0.6 * start["sft_loss"]
    if objective != "sft":
        assert result.final["accuracy"] == 1.0
    assert (
        set(result.final)
        == {
            "sft": {"sft_loss"},
            "rm": {"rm_loss", "accuracy", "reward_margin", "calibration"},
            "hydra": {"sft_loss", "rm_loss", "accuracy", "reward_margin", "calibration"},
        }[objective]
    )


def test_gradient_checkpointing_changes_nothing():
    settings = {"batch_size": 4, "max_steps": 2, "learning_rate": 1e-2}
    plain, _ = trained(SFTConfig(**settings), pairs(8))
    recomputed, _ = trained(SFTConfig(**settings, gradient_checkpointing=True), pairs(8))
    torch.testing.assert_close(weights(recomputed), weights(plain), atol=1e-6, rtol=0)


@torch.no_grad()
def test_lora_is_merged_before_it_is_the_base_of_ppo(tmp_path):
    """The merged model, adapter off, is the policy that was trained, adapter on."""
    plain = tiny_model()
    before = {k: v.clone() for k, v in plain.causal_lm.state_dict().items()}
    config = SFTConfig(lora_r=4, batch_size=4, epochs=4, learning_rate=1e-2)
    with torch.enable_grad():
        model, result = trained(config, pairs(8), model=add_lora(plain, config))
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    mask = torch.ones_like(ids)
    policy = model.forward_role("actor", ids, mask)
    off = model.forward_role("reference", ids, mask)
    merged = merge_adapter(model)
    merged.save_pretrained(tmp_path)
    loaded = HydraModel.from_pretrained(tmp_path)
    torch.testing.assert_close(
        loaded.forward_role("reference", ids, mask), policy, atol=1e-5, rtol=1e-5
    )
    assert not torch.allclose(policy, off, atol=1e-2)
    assert torch.equal(loaded.reward_head.weight, model.reward_head.weight)
    assert set(loaded.causal_lm.state_dict()) == set(before), "no trace of the adapter is left"


def test_a_saved_checkpoint_is_any_users(tmp_path):
    from transformers import AutoModelForCausalLM

    model, _ = trained(SFTConfig(batch_size=4, max_steps=2, learning_rate=1e-2), pairs(8))
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, value in model.causal_lm.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], value), name
    ours = HydraModel.from_pretrained(tmp_path)
    assert torch.equal(ours.reward_head.weight, model.reward_head.weight)


def test_a_prompt_as_long_as_the_context_is_refused_before_training():
    long = Preference(" ".join(["5"] * 40), "6", "7")
    with pytest.raises(UserError, match="training pair 2 has 40 tokens.*context of 32"):
        trained(SFTConfig(), [*pairs(1), long])


@pytest.mark.parametrize(
    "settings", [{"gamma": -1}, {"batch_size": 0}, {"warmup_ratio": 1.0}, {"max_length": 0}]
)
def test_settings_out_of_range(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        SFTConfig(**settings)


def test_the_bundled_tokenizer_continues_a_prompt():
    """Prompt and response tokenised apart are the tokens of the whole text."""
    tokenizer = build_tokenizer(["The rain is lovely. I like the rain."], 300)
    encoded = encode_pairs(
        tokenizer, [Preference("The rain.", " I like it.", " I do not.")], max_length=64
    )[0]
    assert encoded.prompt + encoded.chosen[:-1] == tokenizer("The rain. I like it.")["input_ids"]
    assert encoded.chosen[-1] == tokenizer.eos_token_id


def test_rewards_are_float32_under_autocast():
    batch = collate([SHORT, LONG], pad=0)
    with torch.autocast("cpu", torch.bfloat16):
        found = PairLoss(tiny_model(), SFTConfig(objective="rm"), None)(batch)
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert (found["difference"] != found["difference"].bfloat16()).any()


def test_a_batch_without_a_token_to_predict():
    """An empty prompt leaves the first token of an answer unpredicted, and this is all there is."""
    model = tiny_model()
    nothing = [Preference("", "", "3")]
    config = SFTConfig(objective="hydra", batch_size=1, max_steps=1)
    result = sft.train(config, model, Words(), nothing, Tracker(None), eval_pairs=nothing)
    assert result.final["sft_loss"] == 0.0 and math.isfinite(result.final["rm_loss"])
    assert weights(model).isfinite().all()
