import logging

import pytest
import torch
from torch import Tensor

from hydra_kernels.peft import FusedLinear
from hydra_kernels.replay import Replay, filter_logprobs, unavailable
from hydra_rlhf.decode_state import Unsupported
from hydra_rlhf.engine import RolloutEngine
from hydra_rlhf.model import HydraModel
from hydra_rlhf.rollout import Sampling, generate, pad_left
from tests.rlhf.families import EOS, FAMILIES, PAD, VOCAB, make_lm, make_model

# One token, one that fills the width, some between, more of them than rows at a time.
PROMPTS = [[5, 6, 7], [8] * 9, [3, 4, 9, 6, 7, 8, 9], [11], [20, 21], [30] * 4, [2, 40]]
GREEDY = Sampling(
    response_length=20, temperature=1.0, stop_ids=(EOS, 13, 29, 31), pad_id=PAD, do_sample=False
)

CAN_REPLAY = not unavailable()


def prompts(count: int = len(PROMPTS)) -> tuple[Tensor, Tensor]:
    return pad_left(PROMPTS[:count], PAD)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate(family):
    """In one batch and with prompts that wait for a row; sliding windows of 8 are passed."""
    model = make_model(family, trained=True)
    ids, mask = prompts()
    free = generate(model, ids, mask, GREEDY._replace(stop_ids=(VOCAB - 1,)))
    seen = free.query_responses[:, ids.shape[1] :]
    stops = (int(seen[0, 3]), int(seen[1, -1]), int(seen[2, 6]))
    greedy = GREEDY._replace(stop_ids=stops)
    expected = generate(model, ids, mask, greedy, with_logprobs=True)
    assert len(expected.response_mask.sum(-1).unique()) > 1  # rows finish at different steps
    small = {"batch_size": 2, "check_every": 3, "bucket": 4}
    for settings in ({}, small, {**small, "replay": False}):
        engine = RolloutEngine(model, **settings)
        out = engine(model, ids, mask, greedy, with_logprobs=True)
        assert bool(engine._replays) == (settings.get("replay", True) and CAN_REPLAY)
        assert torch.equal(out.query_responses, expected.query_responses)
        assert torch.equal(out.attention_mask, expected.attention_mask)
        assert torch.equal(out.response_mask, expected.response_mask)
        assert torch.equal(out.ended, expected.ended)
        # the same float32 sums in another order
        torch.testing.assert_close(out.logprobs, expected.logprobs, rtol=0, atol=1e-5)


def test_one_by_one_equals_together():
    model = make_model("llama", trained=True)
    ids, mask = prompts()
    together = RolloutEngine(model, batch_size=3).generate(ids, mask, GREEDY)
    for row in range(len(ids)):
        alone = RolloutEngine(model).generate(ids[row : row + 1], mask[row : row + 1], GREEDY)
        assert torch.equal(alone.tokens[0], together.tokens[row])
        assert alone.lengths[0] == together.lengths[row]


def test_logprobs_are_those_of_scoring():
    """Below 1e-4 in float32: what a PPO loop that does not recompute relies on."""
    model = make_model("qwen3", trained=True)
    ids, mask = prompts()
    sampling = Sampling(response_length=9, temperature=0.7, stop_ids=(EOS,), pad_id=PAD)
    out = RolloutEngine(model)(model, ids, mask, sampling, with_logprobs=True)
    with torch.no_grad():
        scored = model.score(
            out.query_responses,
            out.attention_mask,
            out.response_mask,
            roles=("actor",),
            temperature=0.7,
        )
    assert (out.logprobs - scored.logprobs).abs().max() < 1e-5
    assert out.logprobs.min() < -1.0


def test_all_finished_at_step_one():
    model = make_model("llama")
    ids, mask = prompts(3)
    every = GREEDY._replace(stop_ids=tuple(range(VOCAB)))
    out = RolloutEngine(model)(model, ids, mask, every)
    assert out.response_mask.tolist() == [[True]] * 3 and out.ended.all()


def test_length_one_and_context_limit():
    model = make_model("gpt2", trained=True)  # 64 learned positions
    ids, mask = prompts(4)
    for length in (1, 64 - ids.shape[1]):
        sampling = GREEDY._replace(response_length=length)
        out = RolloutEngine(model)(model, ids, mask, sampling)
        expected = generate(model, ids, mask, sampling)
        assert torch.equal(out.query_responses, expected.query_responses)


def test_seeds_do_not_see_their_neighbours():
    model = make_model("llama", trained=True)
    ids, mask = prompts()
    sampling = GREEDY._replace(do_sample=True)
    seeds = [7 * i for i in range(len(ids))]
    first = RolloutEngine(model).generate(ids, mask, sampling, seeds=seeds)
    order = [4, 0, 6, 2]
    some = RolloutEngine(model, batch_size=2).generate(
        ids[order], mask[order], sampling, seeds=[seeds[i] for i in order]
    )
    assert torch.equal(some.tokens, first.tokens[order])
    others = RolloutEngine(model).generate(ids, mask, sampling, seeds=[s + 1 for s in seeds])
    assert not torch.equal(others.tokens, first.tokens)
    with pytest.raises(ValueError, match="7 prompts need as many seeds, got 2"):
        RolloutEngine(model).generate(ids, mask, sampling, seeds=[1, 2])


def test_torch_seed_repeats():
    model = make_model("llama")
    ids, mask = prompts()
    drawn = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        drawn.append(RolloutEngine(model).generate(ids, mask, GREEDY._replace(do_sample=True)))
    assert torch.equal(drawn[0].tokens, drawn[1].tokens)
    assert not torch.equal(drawn[0].tokens, drawn[2].tokens)


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.3}])
def test_first_token_follows_the_softmax(settings):
    """Chi-squared of 4000 draws against the distribution that was asked for."""
    model = make_model("llama", trained=True)
    ids, mask = pad_left([[5, 6, 7]], PAD)
    sampling = Sampling(1, 0.8, (EOS,), PAD, **settings)
    draws = RolloutEngine(model).generate(ids.repeat(4000, 1), mask.repeat(4000, 1), sampling)
    with torch.no_grad():
        logits = model.forward_role("actor", ids, mask)[0, -1].double() / 0.8
    expected = allowed(torch.softmax(logits, -1), **settings)
    counts = torch.bincount(draws.tokens[:, 0], minlength=VOCAB).double()
    assert not counts[expected == 0].any()
    # cells with few expected draws go together, as the test needs
    few = expected * 4000 < 5
    observed = torch.cat([counts[~few], counts[few].sum()[None]])
    wanted = torch.cat([expected[~few], expected[few].sum()[None]]) * 4000
    kept = wanted > 0
    statistic = ((observed - wanted)[kept] ** 2 / wanted[kept]).sum()
    degrees = torch.tensor(float(kept.sum() - 1), dtype=torch.float64)
    assert torch.special.gammaincc(degrees / 2, statistic / 2) > 1e-4  # the p-value
    # the log-probabilities of what was sampled from, beside those of the policy
    first = draws.tokens[:, 0]
    torch.testing.assert_close(
        draws.sampled_logprobs[:, 0].double(), expected.log()[first], rtol=0, atol=1e-5
    )
    policy = torch.log_softmax(logits, -1)
    torch.testing.assert_close(draws.logprobs[:, 0].double(), policy[first], rtol=0, atol=1e-5)


def allowed(p: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """The filters' definitions, token by token."""
    order = sorted(range(len(p)), key=lambda i: -p[i])
    kept, held = [], 0.0
    for rank, token in enumerate(order):
        if (top_k and rank >= top_k) or held >= top_p or p[token] < min_p * p[order[0]]:
            break
        kept.append(token)
        held += float(p[token])
    out = torch.zeros_like(p)
    out[kept] = p[kept] / p[kept].sum()
    return out


def test_filters_together():
    torch.manual_seed(3)
    logprobs = torch.log_softmax(2 * torch.randn(6, 40), -1)
    columns = torch.zeros(6, 1, dtype=torch.long)
    got = filter_logprobs(logprobs, columns, top_k=12, top_p=0.8, min_p=0.02).exp()
    for row in range(6):
        step = allowed(logprobs[row].exp(), top_k=12)
        step = allowed(allowed(step, top_p=0.8), min_p=0.02)
        torch.testing.assert_close(got[row], step, rtol=1e-5, atol=1e-6)


def test_minimum_length_keeps_stops_away():
    model = make_model("llama", trained=True)
    ids, mask = prompts()
    often = GREEDY._replace(stop_ids=tuple(range(1, 60)), min_response_length=6, do_sample=True)
    out = RolloutEngine(model).generate(ids, mask, often)
    assert out.lengths.min() >= 7 and out.ended.any()
    assert not torch.isin(out.tokens[:, :6], torch.tensor(often.stop_ids)).any()


def test_weights_and_roles_are_read_in_place():
    model = make_model("llama", trained=True)
    ids, mask = prompts()
    engine = RolloutEngine(model)
    actor = engine.generate(ids, mask, GREEDY)
    reference = engine.generate(ids, mask, GREEDY, role="reference")
    assert not torch.equal(actor.tokens, reference.tokens)
    with torch.no_grad():
        for parameter in model.adapter_parameters("actor"):
            parameter.mul_(-2.0)
    moved = engine.generate(ids, mask, GREEDY)
    expected = generate(model, ids, mask, GREEDY)
    width = expected.response_mask.shape[1]
    assert torch.equal(moved.tokens[:, :width], expected.query_responses[:, ids.shape[1] :])
    assert not torch.equal(moved.tokens, actor.tokens)
    again = engine.generate(ids, mask, GREEDY, role="reference")
    assert torch.equal(again.tokens, reference.tokens)


def test_values_come_with_a_joint_adapter():
    model = make_model("llama", ("joint",), trained=True)
    ids, mask = prompts()
    engine = RolloutEngine(model, batch_size=4)
    out = engine.generate(ids, mask, GREEDY, values=True)
    rollout = RolloutEngine(model)(model, ids, mask, GREEDY)
    with torch.no_grad():
        scored = model.score(
            rollout.query_responses,
            rollout.attention_mask,
            rollout.response_mask,
            roles=("critic",),
        )
    width = rollout.response_mask.shape[1]
    torch.testing.assert_close(out.values[:, :width], scored.values, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="one adapter for actor and critic"):
        two = make_model("llama")
        RolloutEngine(two).generate(ids, mask, GREEDY, values=True)


def test_buffers_are_kept_and_released():
    model = make_model("llama")
    ids, mask = prompts()
    engine = RolloutEngine(model)
    assert engine.nbytes == 0
    engine.generate(ids, mask, GREEDY)
    # 3 layers, keys and values, 7 rows, 2 heads of 8 floats, 9 + 20 slots
    assert engine.nbytes == 3 * 2 * 7 * 2 * 8 * 4 * (9 + 20)
    held = engine._state
    first = engine.generate(ids, mask, GREEDY)
    assert engine._state is held
    engine.release()
    assert engine.nbytes == 0
    steps = dict(engine._replays)
    others = torch.full((3 * 2 * 7 * 2 * 8 * 29,), torch.nan)  # where the buffers were
    again = engine.generate(ids, mask, GREEDY)
    assert torch.equal(again.tokens, first.tokens)
    assert torch.equal(again.logprobs, first.logprobs)
    assert engine._replays == steps and others.isnan().all()  # not recorded again
    engine.release()
    longer = engine.generate(ids, mask, GREEDY._replace(response_length=21))
    assert torch.equal(longer.tokens[:, :20][first.lengths < 20], first.tokens[first.lengths < 20])


@pytest.mark.parametrize("settings", [{}, {"replay": False, "bucket": 4}])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_narrower_prompts_in_buffers_of_wider_ones(family, settings):
    """Recorded once for all; what lay there before does not matter. Windows of 8 are passed."""
    model = make_model(family, trained=True, layers_to_transform=[2])
    engine = RolloutEngine(model, **settings)
    seen = []
    for some in (PROMPTS[:3], [[5, 6], [7], [8, 9, 10]], [[4], [3], [2]], [[5] * 4, [6] * 9, [7]]):
        given = pad_left(some, PAD)
        out = engine.generate(*given, GREEDY, keep_prefix=True)
        seen.append((engine._state, *engine._replays.values()))
        fresh = RolloutEngine(model, replay=False).generate(*given, GREEDY, keep_prefix=True)
        assert torch.equal(out.tokens, fresh.tokens)
        torch.testing.assert_close(out.logprobs, fresh.logprobs, rtol=0, atol=1e-5)
        assert out.prefix.hidden.shape == fresh.prefix.hidden.shape
        torch.testing.assert_close(out.prefix.hidden, fresh.prefix.hidden, rtol=1e-5, atol=1e-5)
    assert all(state is seen[0][0] and (*steps,) == seen[0][1:] for state, *steps in seen)
    engine.generate(*pad_left([[5] * 10, [6], [7]], PAD), GREEDY, keep_prefix=True)
    assert engine._state is not seen[0][0]


def test_model_without_adapters():
    model = HydraModel(make_lm("opt"))
    ids, mask = prompts()
    out = RolloutEngine(model)(model, ids, mask, GREEDY)
    assert torch.equal(out.query_responses, generate(model, ids, mask, GREEDY).query_responses)


def test_falls_back_once_and_says_so(caplog, monkeypatch):
    model = make_model("llama")
    ids, mask = prompts()
    engine = RolloutEngine(model)

    def refuse(*args, **kwargs):
        raise Unsupported("its past is a convolution")

    monkeypatch.setattr(engine, "generate", refuse)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            out = engine(model, ids, mask, GREEDY)
    assert torch.equal(out.query_responses, generate(model, ids, mask, GREEDY).query_responses)
    (message,) = [r.getMessage() for r in caplog.records if "rollouts run" in r.getMessage()]
    assert message.endswith("its past is a convolution")


replayed = pytest.mark.skipif(not CAN_REPLAY, reason="the C++ extension is not built")


@replayed
@pytest.mark.parametrize("settings", [{}, {"top_k": 9, "top_p": 0.9}, {"min_response_length": 5}])
def test_replay_samples_what_pytorch_does(settings):
    """The same uniforms give the same tokens."""
    model = make_model("llama", ("joint",), trained=True)
    ids, mask = prompts()
    sampling = Sampling(20, 0.8, (EOS, 13), PAD, **settings)
    seeds = list(range(len(ids)))
    outs = []
    for replay in (True, False):
        engine = RolloutEngine(model, replay=replay)
        outs.append(engine.generate(ids, mask, sampling, seeds=seeds, values=True))
        assert bool(engine._replays) == replay
    for ours, torchs in zip(outs[0][:6], outs[1][:6], strict=True):
        torch.testing.assert_close(ours, torchs, rtol=0, atol=1e-5)


@replayed
@pytest.mark.parametrize("change", ["data", "scaling", "disabled", "head"])
def test_a_changed_model_is_recorded_anew(change):
    model = make_model("llama", trained=True)
    ids, mask = prompts()
    engine = RolloutEngine(model)
    before = engine.generate(ids, mask, GREEDY)
    layers = [m for m in model.base.modules() if isinstance(m, FusedLinear)]
    if change == "data":
        for parameter in model.adapter_parameters("actor"):
            parameter.data = -2.0 * parameter.data
    elif change == "scaling":
        for layer in layers:
            layer.scaling["actor"] *= -3.0
    elif change == "disabled":
        for layer in layers:
            layer.enable_adapters(False)
    else:
        head = model.causal_lm.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().flip(0))
        model.__dict__["lm_head"] = type(model.lm_head).from_model(model.causal_lm)
    after = engine.generate(ids, mask, GREEDY)
    expected = RolloutEngine(model, replay=False).generate(ids, mask, GREEDY)
    assert torch.equal(after.tokens, expected.tokens)
    assert not torch.equal(after.tokens, before.tokens)


def test_what_cannot_be_replayed_runs_and_says_so_once(caplog):
    model = make_model("llama").half()
    ids, mask = prompts()
    engine = RolloutEngine(model)
    with caplog.at_level(logging.WARNING):
        outs = [engine.generate(ids, mask, GREEDY) for _ in range(2)]
    assert torch.equal(outs[0].tokens, outs[1].tokens)
    (record,) = [r for r in caplog.records if "one PyTorch operation" in r.message]
    # Who keeps the record keeps no exception, whose frames hold all that was recorded.
    assert all(isinstance(part, str) for part in record.args)
    if CAN_REPLAY:
        assert "torch.float16" in record.getMessage()


@replayed
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapters", [torch.bfloat16, torch.float32], ids=["half", "float32"])
def test_bfloat16_is_replayed(family, adapters, caplog):
    """No farther from the same weights in float32 than PyTorch's bfloat16 operations are."""
    if family != "llama" and adapters == torch.bfloat16:
        return  # the adapters' layer is no family's
    half = make_model(family, trained=True).bfloat16()
    for name, parameter in half.base.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapters)
    exact = make_model(family, trained=True)
    exact.load_state_dict({n: t.float() for n, t in half.state_dict().items()})
    ids, mask = prompts()
    sampling = GREEDY._replace(do_sample=True, response_length=6, stop_ids=(VOCAB - 1,))
    errors = []
    for replay in (True, False):
        engine = RolloutEngine(half, replay=replay)
        out = engine(half, ids, mask, sampling, with_logprobs=True, seeds=range(7))
        assert bool(engine._replays) == replay
        assert engine._state.cache.pairs[0][0].dtype == torch.bfloat16
        with torch.no_grad():
            scored = exact.score(
                out.query_responses, out.attention_mask, out.response_mask, roles=("actor",)
            )
        errors.append((out.logprobs - scored.logprobs)[out.response_mask].square().mean().sqrt())
    assert errors[0] <= 1.1 * errors[1], errors
    assert errors[0] < 0.1


@replayed
def test_a_replay_that_computes_something_else_is_not_used(monkeypatch, caplog):
    model = make_model("llama", trained=True)
    ids, mask = prompts()
    call = Replay.__call__

    def wrong(self):
        call(self)
        self.outputs[1].add_(0.1)

    monkeypatch.setattr(Replay, "__call__", wrong)
    engine = RolloutEngine(model)
    out = engine(model, ids, mask, GREEDY)
    assert torch.equal(out.query_responses, generate(model, ids, mask, GREEDY).query_responses)
    assert "its replay is 0.1 off" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_graph_replay(family):
    """Captured once, replayed after an optimizer step and under another role."""
    model = make_model(family, trained=True).cuda()
    ids, mask = (t.cuda() for t in prompts())
    captured = RolloutEngine(model, bucket=16, graph=True)
    plain = RolloutEngine(model, bucket=16, graph=False)
    for role in ("actor", "reference", "actor"):
        a = captured.generate(ids, mask, GREEDY, role=role)
        b = plain.generate(ids, mask, GREEDY, role=role)
        assert torch.equal(a.tokens, b.tokens), role
        with torch.no_grad():
            for parameter in model.adapter_parameters("actor"):
                parameter.add_(0.05 * torch.randn_like(parameter))
    assert 1 <= len(captured._graphs) <= 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
@pytest.mark.parametrize(
    "settings", [{}, {"batch_size": 2, "check_every": 3, "bucket": 4, "replay": False}]
)
def test_prefix_of_a_rollout_is_that_of_scoring(family, settings):
    """Up to float32 sums in another order, on every token of prompt and response."""
    model = make_model(family, trained=True, layers_to_transform=[2])
    ids, mask = prompts()
    sampling = GREEDY._replace(do_sample=True)
    engine = RolloutEngine(model, **settings)
    for _ in range(2):  # the second time in the buffers of the first
        out = engine(
            model, ids, mask, sampling, with_logprobs=True, seeds=range(7), keep_prefix=True
        )
    assert out.prefix is not None and 1 < len(out.response_mask.sum(-1).unique())
    wanted = model.compute_prefix(out.query_responses, out.attention_mask)
    assert (out.prefix.layer, out.prefix.as_tuple) == (wanted.layer, wanted.as_tuple)
    assert out.prefix.hidden.shape == wanted.hidden.shape
    counted = out.attention_mask.bool()
    torch.testing.assert_close(
        out.prefix.hidden[counted], wanted.hidden[counted], rtol=1e-5, atol=1e-5
    )
    scores = [
        model.score(out.query_responses, out.attention_mask, out.response_mask, prefix=prefix)
        for prefix in (out.prefix, wanted)
    ]
    for kept, recomputed in zip(*scores, strict=True):
        if kept is not None:
            torch.testing.assert_close(kept, recomputed, rtol=0, atol=1e-5)


def test_no_prefix_below_the_first_block_or_unasked():
    ids, mask = prompts(2)
    model = make_model("llama", trained=True)
    assert RolloutEngine(model)(model, ids, mask, GREEDY, keep_prefix=True).prefix is None
    model = make_model("llama", layers_to_transform=[1])
    engine = RolloutEngine(model)
    assert engine(model, ids, mask, GREEDY).prefix is None
    assert engine(model, ids, mask, GREEDY, keep_prefix=True).prefix is not None
    assert engine(model, ids, mask, GREEDY).prefix is None
    assert not list(model.trunk.layers[1]._forward_pre_hooks)
