"""HydraModel: roles, reuse and files, over every family."""

import inspect

import peft
import pytest
import torch
import transformers

from hydra_rlhf.errors import UserError
from hydra_rlhf.methods import MethodModels
from hydra_rlhf.model import (
    REWARD_HEAD,
    ROLES,
    HydraModel,
    default_lora_config,
    last_token,
    position_ids,
)
from tests.rlhf.families import (
    CONFIGS,
    FAMILIES,
    MORE,
    PAD,
    THREE,
    batch,
    make_lm,
    make_model,
    train_by_chance,
)

FIELDS = ("logprobs", "ref_logprobs", "kl", "entropy", "values", "scores")
ATOL = 2e-5  # float32 over three blocks of width 32, logits up to about 10


def scores_of(model, inputs, **kwargs):
    with torch.no_grad():
        return model.score(*inputs, kl=True, entropy=True, **kwargs)


def assert_equal(a, b, fields=FIELDS):
    for name in fields:
        assert torch.equal(getattr(a, name), getattr(b, name)), name


@pytest.mark.parametrize("adapters", [("actor", "critic"), ("joint",)], ids=["hydra", "joint"])
@pytest.mark.parametrize("family", FAMILIES)
def test_before_the_first_update(family, adapters):
    """Actor is reference and value is reward, bit for bit, and the KL is exactly 0."""
    model = make_model(family, adapters)
    inputs = batch()
    out = scores_of(model, inputs)
    assert torch.equal(out.logprobs, out.ref_logprobs)
    assert not out.kl.any()
    with torch.no_grad():
        critic = model.forward_role("critic", *inputs[:2])
        reward = model.forward_role("reward", *inputs[:2])
    assert torch.equal(critic, reward)
    assert out.logprobs[inputs[2]].std() > 0.1, "a model that says nothing passes anything"


@pytest.mark.parametrize("family", FAMILIES)
def test_score_against_logits(family):
    """Every field by the long way, from forward_role and log_softmax."""
    model = make_model(family, trained=True)
    ids, mask, response_mask = inputs = batch()
    out = scores_of(model, inputs, temperature=0.7)
    T = response_mask.shape[1]
    with torch.no_grad():
        logits = {r: model.forward_role(r, ids, mask) for r in ("actor", "reference")}
        new, ref = (torch.log_softmax(logits[r][:, -T - 1 : -1] / 0.7, -1) for r in logits)
        values = model.forward_role("critic", ids, mask)[:, -T - 1 : -1]
        rewards = model.forward_role("reward", ids, mask)
    tokens = ids[:, -T:, None]
    kept = response_mask
    expected = {
        "logprobs": new.gather(-1, tokens).squeeze(-1)[kept],
        "ref_logprobs": ref.gather(-1, tokens).squeeze(-1)[kept],
        "kl": (new.exp() * (new - ref)).sum(-1)[kept],
        "entropy": -(new.exp() * new).sum(-1)[kept],
        "values": values[kept],
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(out, name)[kept], value, atol=ATOL, rtol=1e-4, msg=name)
        assert not getattr(out, name)[~kept].any(), name
    lengths = mask.sum(-1)
    for row in range(ids.shape[0]):
        # The last real token: padding on the left, then the sequence, then padding.
        last = int(mask[row].nonzero().max())
        assert lengths[row] == mask[row, : last + 1].sum()
        torch.testing.assert_close(out.scores[row], rewards[row, last], atol=ATOL, rtol=1e-4)
    assert (out.logprobs - out.ref_logprobs).abs().max() > 1e-2, "the adapter does nothing"


@pytest.mark.parametrize("family", MORE)
def test_families_that_nothing_was_written_for(family):
    """The model's own log-probabilities, one batch or several, with and without a prefix."""
    model = make_model(family, trained=True, layers_to_transform=[1, 2])
    ids, mask, response_mask = inputs = batch()
    out = scores_of(model, inputs)
    T, plain = response_mask.shape[1], make_lm(family)
    known = {"position_ids": position_ids(mask)}
    if "position_ids" not in inspect.signature(plain.forward).parameters:
        known = {}
    with torch.no_grad():
        logits = plain(ids, attention_mask=mask, **known).logits[:, -T - 1 : -1]
    expected = logits.log_softmax(-1).gather(-1, ids[:, -T:, None]).squeeze(-1)[response_mask]
    torch.testing.assert_close(out.ref_logprobs[response_mask], expected, atol=5e-5, rtol=1e-4)
    assert (out.logprobs - out.ref_logprobs).abs().max() > 1e-3, "the adapter does nothing"
    prefix = model.compute_prefix(ids, mask)
    assert_equal(scores_of(model, inputs, prefix=prefix), out)
    at_once = scores_of(model, inputs, prefix=prefix, batched=True)
    torch.testing.assert_close(at_once.logprobs, out.logprobs, atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(at_once.values, out.values, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_is_sequential(family):
    model = make_model(family, trained=True)
    inputs = batch()
    one_by_one = scores_of(model, inputs)
    at_once = scores_of(model, inputs, batched=True)
    for name in FIELDS:
        torch.testing.assert_close(
            getattr(at_once, name), getattr(one_by_one, name), atol=ATOL, rtol=1e-4, msg=name
        )


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_prefix_is_exact(family, layer):
    """Starting at the first adapted block gives the same bits as starting at the bottom."""
    model = make_model(family, trained=True, layers_to_transform=list(range(layer, 3)))
    inputs = batch()
    prefix = model.compute_prefix(*inputs[:2])
    assert prefix.layer == layer
    assert_equal(scores_of(model, inputs, prefix=prefix), scores_of(model, inputs))
    batched = scores_of(model, inputs, prefix=prefix, batched=True)
    torch.testing.assert_close(
        batched.logprobs, scores_of(model, inputs).logprobs, atol=ATOL, rtol=0
    )


@pytest.mark.parametrize("family", THREE)
def test_prefix_gives_the_same_gradients(family):
    model = make_model(family, trained=True, layers_to_transform=[2])
    inputs = batch()
    prefix = model.compute_prefix(*inputs[:2])

    def gradients(prefix):
        model.zero_grad()
        out = model.score(*inputs, roles=("actor", "critic"), prefix=prefix)
        (out.logprobs.sum() + out.values.sum()).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    with_prefix, without = gradients(prefix), gradients(None)
    assert len(with_prefix) == len(without) > 8
    for a, b in zip(with_prefix, without, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reentrant", [True, False])
def test_prefix_gives_the_same_gradients_where_blocks_are_recomputed(reentrant):
    model = make_model("llama", trained=True, layers_to_transform=[1, 2])
    inputs = batch()
    prefix = model.compute_prefix(*inputs[:2])
    model.score(*inputs, roles=("actor",)).logprobs.sum().backward()
    expected = [p.grad.clone() for p in model.adapter_parameters("actor")]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.score(*inputs, roles=("actor",), prefix=prefix).logprobs.sum().backward()
    for p, grad in zip(model.adapter_parameters("actor"), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, atol=1e-5, rtol=1e-4)


def test_dropout_is_drawn_again_where_blocks_are_recomputed():
    """``hidden`` in training mode, GPT-2's dropout and LoRA's: the gradients of its own masks."""
    model = make_model("gpt2", trained=True, lora_dropout=0.3).train()
    inputs = batch()[:2]
    found = []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable()
        torch.manual_seed(2)
        model.hidden(*inputs, role="actor").square().sum().backward()
        found.append([p.grad.clone() for p in model.adapter_parameters("actor")])
        model.zero_grad()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_no_pass_of_a_role_has_dropout():
    """In training mode, with GPT-2's dropout of a tenth everywhere: the same twice."""
    model = make_model("gpt2", trained=True, layers_to_transform=[1, 2], lora_dropout=0.5).train()
    ids, mask, _ = batch(padded=False)

    @torch.no_grad()
    def passes():
        outputs = [model.forward_role(role, ids, mask) for role in ROLES]
        outputs.append(model.compute_prefix(ids, mask).hidden)
        sampling = {"max_new_tokens": 20, "do_sample": False}
        return [*outputs, model.generate(ids, attention_mask=mask, **sampling)]

    for first, second in zip(passes(), passes(), strict=True):
        assert torch.equal(first, second)
    assert all(module.training for module in model.modules())


def test_prefix_of_rows_and_no_prefix():
    model = make_model("llama", trained=True, layers_to_transform=[1, 2])
    ids, mask, response_mask = batch()
    prefix = model.compute_prefix(ids, mask)
    rows = torch.tensor([2, 0])
    some = scores_of(model, (ids[rows], mask[rows], response_mask[rows]), prefix=prefix.rows(rows))
    every = scores_of(model, (ids, mask, response_mask))
    torch.testing.assert_close(some.logprobs, every.logprobs[rows], atol=ATOL, rtol=0)
    assert make_model("llama").compute_prefix(ids, mask) is None
    assert prefix.offload().hidden.equal(prefix.hidden)


def test_prefix_leaves_the_trunk_alone():
    model = make_model("llama", layers_to_transform=[1, 2])
    before = list(model.trunk.layers)
    prefix = model.compute_prefix(*batch()[:2])
    scores_of(model, batch(), prefix=prefix)
    assert [id(m) for m in model.trunk.layers] == [id(m) for m in before]
    assert len(list(model.trunk.layers[0].children())) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_does_not_move_a_sequence(family):
    """The same sequence alone and beside a longer one, its padding any token."""
    model = make_model(family, trained=True)
    ids, mask, response_mask = batch(1, prompt=3, response=4, padded=False)
    alone = scores_of(model, (ids, mask, response_mask))
    for token in (PAD, 5):
        wide = torch.cat([torch.full((1, 6), token), ids], 1)
        wide_mask = torch.cat([torch.zeros(1, 6, dtype=torch.long), mask], 1)
        padded = scores_of(model, (wide, wide_mask, response_mask))
        for name in FIELDS:
            torch.testing.assert_close(
                getattr(padded, name), getattr(alone, name), atol=ATOL, rtol=1e-4, msg=name
            )


def test_passes():
    """Two passes for the joint adapter, three for two adapters."""
    joint, hydra = make_model("llama", ("joint",)), make_model("llama")
    assert (joint.num_passes(), hydra.num_passes()) == (2, 3)
    assert (joint.num_passes(reuse=False), hydra.num_passes(reuse=False)) == (3, 4)
    counted = []
    for model in (joint, hydra):
        for reuse in (True, False):
            handle = model.trunk.register_forward_hook(lambda *_: counted.append(1))
            scores_of(model, batch(), reuse_reference_reward=reuse)
            handle.remove()
            assert len(counted) == model.num_passes(reuse=reuse)
            counted.clear()


def test_one_pass_for_reference_and_reward_changes_nothing():
    model = make_model("llama", trained=True)
    assert_equal(scores_of(model, batch()), scores_of(model, batch(), reuse_reference_reward=False))


def test_scaling_is_one_unless_told():
    lm = make_lm("llama")
    assert default_lora_config(lm).r == default_lora_config(lm).lora_alpha == 128
    assert default_lora_config(lm, r=4).lora_alpha == 4
    assert default_lora_config(lm, r=4, lora_alpha=2).lora_alpha == 2


def test_positions_and_last_token():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 3]]
    response = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])
    assert last_token(response).tolist() == [1, 2, -1]
    assert last_token(torch.tensor([[True, False, True], [False, True, False]])).tolist() == [2, 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_load_in_peft(family, tmp_path):
    """What is saved is a plain PEFT folder, and gives the logits of the actor."""
    model = make_model(family, trained=True)
    ids, mask, _ = batch()
    model.save_adapters(tmp_path)
    for role in ("actor", "critic"):
        lm = make_lm(family)
        loaded = peft.PeftModel.from_pretrained(lm, tmp_path / role).eval()
        assert not loaded.peft_config["default"].modules_to_save
        with torch.no_grad():
            adapter_id = model.adapter_id(role)
            hidden = model.hidden(ids, mask, adapter_ids=adapter_id)
            expected = model.lm_head.logits(hidden)
            logits = loaded(ids, attention_mask=mask, position_ids=position_ids(mask)).logits
        torch.testing.assert_close(logits, expected, atol=ATOL, rtol=1e-4)


def test_save_and_load(tmp_path):
    model = make_model("llama", trained=True)
    with torch.no_grad():
        model.value_head.weight.add_(1.0)
    model.save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, value in make_lm("llama").state_dict().items():
        assert torch.equal(plain.state_dict()[name], value), name
    config = default_lora_config(plain, r=4, lora_alpha=8)
    again = HydraModel.from_pretrained(tmp_path, adapters=("actor", "critic"), lora_config=config)
    assert again.base.get_nb_trainable_parameters()[0] > 0
    again.load_adapters(tmp_path)
    assert_equal(scores_of(again, batch()), scores_of(model, batch()))


def test_loaded_adapters_bring_both_heads(tmp_path):
    """Into a model that has heads of its own."""
    saved, other = make_model("llama", trained=True), make_model("llama", seed=1)
    with torch.no_grad():
        saved.value_head.weight.add_(1.0)
    saved.save_adapters(tmp_path)
    other.load_adapters(tmp_path)
    assert torch.equal(other.value_head.weight, saved.value_head.weight)
    assert torch.equal(other.reward_head.weight, saved.reward_head.weight)


def test_adapters_stay_trainable():
    """Nothing about a role touches requires_grad: all adapters are trainable, nothing else is."""
    model = make_model("llama")
    for role in ROLES:
        model.forward_role(role, *batch()[:2])
        model.generate(batch()[0], attention_mask=batch()[1], max_new_tokens=1, role="reference")
        for name, parameter in model.base.named_parameters():
            assert parameter.requires_grad == ("lora_" in name), name
    assert not model.reward_head.weight.requires_grad
    assert model.value_head.weight.requires_grad


def test_reference_adapter(tmp_path):
    """A frozen SFT adapter is the reference and where the actor starts; reward is adapter-off."""
    sft = make_model("llama", ("actor",), trained=True)
    sft.save_adapters(tmp_path)
    lm = make_lm("llama")
    model = HydraModel(
        lm,
        adapters=("actor", "critic"),
        lora_config=default_lora_config(lm, r=4, lora_alpha=8),
        reward_head=sft.reward_head,
        reference_adapter=str(tmp_path / "actor"),
    )
    out, base = scores_of(model, batch()), scores_of(sft, batch())
    assert torch.equal(out.ref_logprobs, base.logprobs)
    assert torch.equal(out.logprobs, base.logprobs)
    assert torch.equal(out.scores, base.scores)
    assert model.num_passes() == 4
    train_by_chance(model)
    frozen = [p for n, p in model.base.named_parameters() if ".reference." in n]
    assert frozen and not any(p.requires_grad for p in frozen)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adapters": ("actor", "joint")}, "adapters must be one of"),
        ({"reference_adapter": "/nowhere"}, "needs a method with adapters"),
        ({"adapters": ("actor",), "reference_adapter": "/nowhere"}, "cannot read a LoRA adapter"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        HydraModel(make_lm("llama"), **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "lora", "message"),
    [
        ("llama", {"target_modules": ["lm_head"]}, "no layer of the decoder is named lm_head"),
        ("llama", {"target_modules": ["q_proj", "embed_tokens"]}, "1 of the adapted layers cannot"),
        ("llama", {"target_modules": ["nothing"]}, "no layer of the decoder is named nothing"),
        ("mamba", {}, "cannot put adapters on this mamba model"),
    ],
)
def test_layers_that_cannot_take_a_role(family, lora, message, monkeypatch):
    """Told when the adapters are made, before any pass."""
    mamba = lambda: transformers.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2)  # noqa: E731
    monkeypatch.setitem(CONFIGS, "mamba", mamba)
    with pytest.raises(UserError, match=message) as caught:
        make_model(family, **lora)
    assert "\n" not in str(caught.value)


def test_a_kl_needs_both_policies():
    one, other = make_model("llama", ("actor",)), make_model("llama", ())
    methods = (
        MethodModels("hydra-ppo", *[make_model("llama")] * 4),
        MethodModels("lora-ppo", one, one, other, other),
    )
    for models in (make_model("llama"), *methods):
        for roles in (("actor", "critic"), ("reference",), ("critic", "reward")):
            with pytest.raises(ValueError, match=r"kl needs the roles actor and reference, got \("):
                models.score(*batch(), roles=roles, kl=True)
        assert models.score(*batch(), roles=("reference", "actor"), kl=True).kl is not None
        with pytest.raises(ValueError, match="role must be one of"):
            models.score(*batch(), roles=("actor", "judge"))
    without = MethodModels("lora-ppo", one, one, other, None)
    with pytest.raises(ValueError, match="lora-ppo holds no model for the role reward"):
        without.score(*batch())


def test_refuses_bad_paths_and_files(tmp_path):
    with pytest.raises(UserError, match="cannot load a causal language model from") as caught:
        HydraModel.from_pretrained(tmp_path / "nothing")
    assert "\n" not in str(caught.value)
    make_lm("llama").save_pretrained(tmp_path)
    (tmp_path / REWARD_HEAD).parent.mkdir()
    (tmp_path / REWARD_HEAD).write_bytes(b"not a head")
    with pytest.raises(UserError, match="cannot read a head"):
        HydraModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="role must be one of"):
        make_model("llama").forward_role("judge", *batch()[:2])
    with pytest.raises(ValueError, match="at least one column must be prompt"):
        ids, mask, _ = batch()
        make_model("llama").score(ids, mask, mask.bool())


@pytest.mark.parametrize("under", ["bfloat16 weights", "autocast"])
def test_heads_are_float32_over_a_decoder_that_is_not(under):
    """Rewards are compared by margins that bfloat16 would round away."""
    model = make_model("llama", trained=True)
    if under == "bfloat16 weights":
        model.base.to(torch.bfloat16)
    inputs = batch()
    last = last_token(inputs[2]) + inputs[0].shape[1] - inputs[2].shape[1]
    states = {}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=under == "autocast"):
        out = model.score(*inputs, keep_states=states)
        reward = model.forward_role("reward", *inputs[:2])
        off = model.hidden(*inputs[:2])
    assert out.values.dtype == out.scores.dtype == reward.dtype == torch.float32
    values = states["critic"].double() @ model.value_head.weight.double().T
    rewards = off.double() @ model.reward_head.weight.double().T
    expected = torch.where(inputs[2], values.squeeze(-1), 0.0)
    torch.testing.assert_close(out.values.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(reward.double(), rewards.squeeze(-1), atol=1e-5, rtol=1e-5)
    assert torch.equal(out.scores, reward[torch.arange(len(last)), last])
