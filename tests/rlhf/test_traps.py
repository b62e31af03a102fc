"""Each trap of the trainer by name, over at least three families.

Traps 7, 9, 10 and 12 are the kernels' and are tested with them.
"""

import threading

import peft
import pytest
import torch

import hydra_kernels.peft
from hydra_rlhf.model import IGNORE, HydraModel, position_ids
from hydra_rlhf.rollout import Sampling, generate, response_lengths
from tests.rlhf.families import (
    EOS,
    FAMILIES,
    PAD,
    THREE,
    batch,
    make_lm,
    make_model,
    train_by_chance,
)

CHECKPOINTS = {"reentrant": {"use_reentrant": True}, "non-reentrant": {"use_reentrant": False}}


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_trap_1_recomputation_sees_the_ids_of_its_own_forward(family, kind):
    """Actor forward, critic forward, reference forward, then one backward under checkpointing."""
    model = make_model(family, trained=True)
    inputs = batch()

    def both_losses():
        actor = model.score(*inputs, roles=("actor",)).logprobs.sum()
        critic = model.score(*inputs, roles=("critic",)).values.sum()
        with torch.no_grad():
            model.score(*inputs, roles=("reference",))
        (actor + critic).backward()
        return gradients(model)

    plain = both_losses()
    model.gradient_checkpointing_enable(CHECKPOINTS[kind])
    assert_same(both_losses(), plain)
    assert sum(".actor." in n for n in plain) == sum(".critic." in n for n in plain) > 10


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("family", THREE)
def test_trap_1_under_transformers_own_checkpointing(family, kind):
    """The same where the user switched on transformers' checkpointing and training mode."""
    model = make_model(family, trained=True)
    ids, mask, _ = batch()
    actor, critic = model.adapter_id("actor"), model.adapter_id("critic")
    weights = torch.randn(32 if family != "opt" else 16)

    def both():
        a = model.hidden(ids, mask, adapter_ids=actor)
        c = model.hidden(ids, mask, adapter_ids=critic)
        ((a * weights).sum() + (c * weights).cos().sum()).backward()
        return gradients(model)

    plain = both()
    model.causal_lm.gradient_checkpointing_enable(CHECKPOINTS[kind])
    model.causal_lm.enable_input_require_grads()
    for module in model.base.modules():
        # Training mode without dropout: what transformers' checkpointing asks for.
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    model.base.train()
    assert_same(both(), plain)


@pytest.mark.parametrize("family", THREE)
def test_trap_1_threads(family):
    """Two threads in different roles do not see each other's ids."""
    model = make_model(family, trained=True)
    inputs = batch()
    expected = {r: model.forward_role(r, *inputs[:2]).detach() for r in ("actor", "reference")}
    wrong = []

    def work(role):
        for _ in range(10):
            with torch.no_grad():
                if not torch.equal(model.forward_role(role, *inputs[:2]), expected[role]):
                    wrong.append(role)

    threads = [threading.Thread(target=work, args=(role,)) for role in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("family", THREE)
def test_trap_2_switching_roles_keeps_every_gradient(family):
    """Actor, critic, back to actor, one backward: both sets have gradients, each its own."""
    model = make_model(family, trained=True)
    inputs = batch()
    model.score(*inputs, roles=("critic",)).values.sum().backward()
    critic_alone = gradients(model)
    actor = model.score(*inputs, roles=("actor",)).logprobs.sum()
    critic = model.score(*inputs, roles=("critic",)).values.sum()
    model.forward_role("actor", *inputs[:2])
    (actor + critic).backward()
    both = gradients(model)
    for name, grad in critic_alone.items():
        assert torch.equal(both[name], grad), name
    assert any(".critic." in n and g.abs().max() > 0 for n, g in both.items())
    assert any(".actor." in n and g.abs().max() > 0 for n, g in both.items())


@pytest.mark.parametrize("family", THREE)
def test_hydra_losses_reach_only_their_own_set(family):
    model = make_model(family, trained=True)
    inputs = batch()
    model.score(*inputs, roles=("actor",)).logprobs.sum().backward()
    names = gradients(model)
    assert names and all(".actor." in n for n in names)
    model.score(*inputs, roles=("critic",)).values.sum().backward()
    names = gradients(model)
    assert all(".critic." in n or n == "value_head.weight" for n in names)
    assert "value_head.weight" in names and len(names) > 10


@pytest.mark.parametrize("family", THREE)
def test_joint_losses_both_reach_the_one_set(family):
    model = make_model(family, ("joint",), trained=True)
    inputs = batch()
    found = []
    for field in ("logprobs", "values"):
        out = model.score(*inputs, roles=("actor", "critic"))
        getattr(out, field).square().sum().backward()
        found.append({n: g for n, g in gradients(model).items() if ".joint." in n})
    policy, value = found
    assert policy.keys() == value.keys() and len(policy) > 10
    for name in policy:
        assert policy[name].abs().max() > 0 and value[name].abs().max() > 0, name
        assert not torch.equal(policy[name], value[name]), name


@pytest.mark.parametrize("family", THREE)
def test_trap_3_heads_do_not_share_storage(family):
    model = make_model(family)
    assert torch.equal(model.value_head.weight, model.reward_head.weight)
    before = model.reward_head.weight.clone()
    with torch.no_grad():
        model.value_head.weight.add_(1.0)
    assert torch.equal(model.reward_head.weight, before)
    assert model.value_head.weight.data_ptr() != model.reward_head.weight.data_ptr()


@pytest.mark.parametrize("family", THREE)
def test_trap_4_the_reward_head_is_frozen(family):
    """Values move with training; scores, from another module, do not."""
    model = make_model(family)
    inputs = batch()
    before = model.score(*inputs, roles=("reward",)).scores
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    values = []
    for _ in range(3):
        out = model.score(*inputs, roles=("critic", "reward"))
        out.values.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(float(out.values.detach().sum()))
    assert values[0] > values[1] > values[2]
    assert torch.equal(model.score(*inputs, roles=("reward",)).scores, before)
    assert model.reward_head.weight.grad is None


@pytest.mark.parametrize("family", THREE)
def test_trap_5_sft_lora_is_merged_before_ppo(family, tmp_path):
    """Merged, adapter-off is the SFT policy; what is saved needs no adapter to be it."""
    torch.manual_seed(1)
    lm = make_lm(family)
    ids, mask, response_mask = batch()
    sft = peft.get_peft_model(lm, peft.LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in sft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    sft.eval()
    with torch.no_grad():
        expected = sft(ids, attention_mask=mask, position_ids=position_ids(mask)).logits
        base = make_lm(family)(ids, attention_mask=mask, position_ids=position_ids(mask)).logits
    assert (expected - base).abs().max() > 1e-2
    HydraModel(sft.merge_and_unload()).save_pretrained(tmp_path)
    model = HydraModel.from_pretrained(tmp_path, adapters=("actor", "critic"))
    with torch.no_grad():
        reference = model.forward_role("reference", ids, mask)
    torch.testing.assert_close(reference, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", THREE)
def test_trap_6_dropout_is_off_where_logprobs_are_taken(family):
    """In training mode with dropout everywhere, LoRA's included: ratio 1 and KL 0, twice."""
    model = make_model(family, lora_dropout=0.5)
    for module in model.base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.5
    model.train()
    inputs = batch()
    first = model.score(*inputs, kl=True)
    second = model.score(*inputs, kl=True)
    assert model.base.training, "the mode is left as it was"
    assert torch.equal(first.logprobs, second.logprobs)
    assert torch.equal(first.logprobs, first.ref_logprobs)
    assert not first.kl.any()
    train_by_chance(model)
    with_dropout = model.hidden(*inputs[:2], role="actor")
    assert not torch.equal(with_dropout, model.hidden(*inputs[:2], role="actor"))


@pytest.mark.parametrize("family", THREE)
def test_trap_8_masked_rows_do_not_matter(family):
    """Whatever stands on padding, inf and NaN in its embedding included, changes no real token."""
    model = make_model(family, trained=True)
    ids, mask, response_mask = batch()
    poisoned_id = 96
    assert not (ids == poisoned_id).any()

    def run(ids):
        out = model.score(ids, mask, response_mask, kl=True)
        (out.logprobs.sum() + out.values.sum()).backward()
        return out, gradients(model)

    clean, clean_grads = run(ids)
    dirty, dirty_grads = run(ids.masked_fill(mask == 0, poisoned_id))
    for name in ("logprobs", "ref_logprobs", "kl", "values", "scores"):
        torch.testing.assert_close(
            getattr(dirty, name), getattr(clean, name), atol=2e-5, rtol=1e-4, msg=name
        )
    assert all(g.isfinite().all() for g in dirty_grads.values())
    assert_same(dirty_grads, clean_grads)
    with torch.no_grad():
        hidden = model.hidden(ids, mask, role="actor")
    bad = hidden.clone()
    targets = ids[:, -5:].masked_fill(~response_mask, IGNORE)
    states = slice(-6, -1)
    bad[:, states][~response_mask] = torch.nan
    a = model.lm_head.logprob(hidden[:, states], targets)
    b = model.lm_head.logprob(bad[:, states], targets)
    assert torch.equal(a.logprobs, b.logprobs) and torch.equal(a.entropy, b.entropy)


@pytest.mark.parametrize("pad", [PAD, EOS], ids=["pad", "pad-is-eos"])
@pytest.mark.parametrize("family", THREE)
def test_trap_11_generation_is_the_scored_policy(family, pad):
    """Log-probabilities from generation equal those from scoring; filters do not touch them."""
    model = make_model(family, trained=True)
    ids, mask = (part[:, :5] for part in batch(6, prompt=5)[:2])
    for extra in ({}, {"top_k": 3}, {"top_p": 0.5}):
        torch.manual_seed(5)
        sampling = Sampling(8, 0.8, (EOS, 7, 11, 13, 17, 19, 23), pad, **extra)
        rollout = generate(model, ids, mask, sampling, with_logprobs=True)
        scored = model.score(
            rollout.query_responses,
            rollout.attention_mask,
            rollout.response_mask,
            roles=("actor",),
            temperature=0.8,
        )
        torch.testing.assert_close(rollout.logprobs, scored.logprobs, atol=1e-4, rtol=0)
        assert rollout.response_mask.any(-1).all()
        assert not rollout.response_mask.all(), "no response ended early"


def test_lengths_are_explicit():
    """pad == eos: the first stop token counts, what follows does not."""
    responses = torch.tensor([[5, EOS, EOS, EOS], [5, 6, 7, 8], [EOS, 5, 6, EOS], [5, 9, 6, EOS]])
    mask, ended = response_lengths(responses, (EOS, 9))
    assert mask.sum(-1).tolist() == [2, 4, 1, 2]
    assert ended.tolist() == [True, False, True, True]
    assert mask[0].tolist() == [True, True, False, False]


@pytest.mark.parametrize("family", THREE)
def test_ids_are_read_in_the_forward_they_are_given_to(family):
    """A batch in which every row has another role."""
    model = make_model(family, trained=True)
    ids, mask, _ = batch(3)
    rows = torch.tensor([model.adapter_id("critic"), -1, model.adapter_id("actor")])
    with torch.no_grad():
        mixed = model.hidden(ids, mask, adapter_ids=rows)
        for row, adapter in enumerate(rows.tolist()):
            alone = model.hidden(ids, mask, adapter_ids=adapter)[row]
            torch.testing.assert_close(mixed[row], alone, atol=2e-5, rtol=1e-4)
    names = hydra_kernels.peft.adapter_names(model.base)
    assert names == ["actor", "critic"]
