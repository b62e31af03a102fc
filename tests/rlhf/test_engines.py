"""One interface, several engines: transformers' continuous batching, and a user's own."""

import gc
import sys
import types

import pytest
import torch
import transformers

from hydra_rlhf.config import ROLLOUT_ENGINES
from hydra_rlhf.continuous_rollout import ContinuousEngine
from hydra_rlhf.engine import RolloutEngine
from hydra_rlhf.engines import GenerateEngine
from hydra_rlhf.errors import UserError
from hydra_rlhf.rollout import Engine, Rollout, Sampling, generate, pad_left
from hydra_rlhf.vllm_rollout import VLLMEngine
from tests.rlhf.families import EOS, PAD, THREE, VOCAB, make_model
from tests.rlhf.test_engine import GREEDY, PROMPTS
from tests.rlhf.test_ppo import plain_model, run, settings

try:
    ContinuousEngine()
    CONTINUOUS = True
except UserError:
    CONTINUOUS = False
continuous = pytest.mark.skipif(not CONTINUOUS, reason="transformers before 5.4")


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
    """transformers looks through the whole heap after each call: half of these tests' time."""
    monkeypatch.setattr(gc, "collect", lambda *args: 0)


@continuous
@pytest.mark.parametrize("family", (*THREE, "mistral"))
def test_continuous_batching_equals_generate(family):
    """Greedy tokens, stops, lengths and log-probabilities, few rows at a time."""
    model = make_model(family, trained=True)
    ids, mask = pad_left(PROMPTS, PAD)
    free = generate(model, ids, mask, GREEDY._replace(stop_ids=(VOCAB - 1,)))
    seen = free.query_responses[:, ids.shape[1] :]
    greedy = GREEDY._replace(stop_ids=(int(seen[0, 3]), int(seen[1, -1]), int(seen[2, 6])))
    expected = generate(model, ids, mask, greedy, with_logprobs=True)
    assert len(expected.response_mask.sum(-1).unique()) > 1
    before = model.causal_lm.config._attn_implementation
    engine = ContinuousEngine(max_batch_tokens=16, max_requests_per_batch=3)
    out = engine(model, ids, mask, greedy, with_logprobs=True)
    assert torch.equal(out.query_responses, expected.query_responses)
    assert torch.equal(out.attention_mask, expected.attention_mask)
    assert torch.equal(out.response_mask, expected.response_mask)
    assert torch.equal(out.ended, expected.ended)
    torch.testing.assert_close(out.logprobs, expected.logprobs, rtol=0, atol=1e-5)
    assert model.causal_lm.config._attn_implementation == before
    assert not model.causal_lm._forward_hooks and not model.causal_lm._forward_pre_hooks


@continuous
def test_continuous_batching_runs_a_roles_adapter_as_it_is_now():
    """Its passes run in another thread, which knows nothing of the adapter ids."""
    model = make_model("llama", trained=True)
    ids, mask = pad_left(PROMPTS[:3], PAD)
    engine = ContinuousEngine()
    outs = {}
    for role in ("actor", "reference"):
        outs[role] = engine(model, ids, mask, GREEDY, role=role).query_responses
        expected = generate(model, ids, mask, GREEDY, role=role).query_responses
        assert torch.equal(outs[role], expected)
    assert not torch.equal(outs["actor"], outs["reference"])
    with torch.no_grad():
        for parameter in model.adapter_parameters("actor"):
            parameter.mul_(-2.0)
    moved = engine(model, ids, mask, GREEDY).query_responses
    assert torch.equal(moved, generate(model, ids, mask, GREEDY).query_responses)
    assert not torch.equal(moved, outs["actor"])
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(UserError, match="mixed_prec"):
        engine(model, ids, mask, GREEDY)


@continuous
def test_continuous_batching_samples_the_policy():
    """Chi-squared of the first tokens; filtered, the log-probabilities are the policy's still."""
    model = make_model("llama", trained=True)
    ids, mask = pad_left([[5, 6, 7]] * 2000, PAD)
    engine = ContinuousEngine()
    with torch.no_grad():
        logits = model.forward_role("actor", ids[:1], mask[:1])[0, -1].double() / 0.8
    policy = torch.log_softmax(logits, -1)
    for changes in ({}, {"top_k": 5}):
        sampling = Sampling(1, 0.8, (EOS,), PAD, **changes)
        state = torch.get_rng_state()
        out = engine(model, ids, mask, sampling, with_logprobs=True, seeds=range(2000))
        assert torch.equal(torch.get_rng_state(), state)
        first = out.query_responses[:, -1]
        torch.testing.assert_close(out.logprobs[:, 0].double(), policy[first], rtol=0, atol=1e-5)
        kept = policy.topk(changes.get("top_k", VOCAB)).indices
        expected = torch.zeros(VOCAB, dtype=torch.float64)
        expected[kept] = torch.softmax(policy[kept], -1) * 2000
        counts = torch.bincount(first, minlength=VOCAB).double()
        assert not counts[expected == 0].any()
        few = expected < 5
        observed = torch.cat([counts[~few], counts[few].sum()[None]])
        wanted = torch.cat([expected[~few], expected[few].sum()[None]])
        some = wanted > 0
        statistic = ((observed - wanted)[some] ** 2 / wanted[some]).sum()
        degrees = torch.tensor(float(some.sum() - 1), dtype=torch.float64)
        assert torch.special.gammaincc(degrees / 2, statistic / 2) > 1e-4


@continuous
def test_continuous_batching_repeats_a_batch_by_its_seeds():
    model = make_model("llama", trained=True)
    ids, mask = pad_left(PROMPTS, PAD)
    sampling = GREEDY._replace(do_sample=True)
    engine = ContinuousEngine()
    outs = [
        engine(model, ids, mask, sampling, seeds=seeds).query_responses
        for seeds in ([1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 8])
    ]
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


@continuous
@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"min_response_length": 3}, "min_response_length 3"),
        ("llama", {"min_p": 0.1}, r"min_p 0\.1"),
        ("gemma2", {}, "attn_logit_softcapping"),
    ],
)
def test_continuous_batching_refuses_what_it_would_leave_out(family, changes, message):
    model = make_model(family)
    ids, mask = pad_left(PROMPTS[:2], PAD)
    with pytest.raises(UserError, match=message):
        ContinuousEngine()(model, ids, mask, GREEDY._replace(**changes))


@continuous
def test_continuous_batching_says_what_failed(monkeypatch):
    model = make_model("llama")
    ids, mask = pad_left(PROMPTS[:2], PAD)

    def fails(*args, **kwargs):
        raise RuntimeError("the pass went wrong")

    monkeypatch.setattr(model.trunk, "forward", fails)
    with pytest.raises(RuntimeError, match="answered 0 of 2 prompts: the pass went wrong"):
        ContinuousEngine()(model, ids, mask, GREEDY)


def test_continuous_batching_needs_a_transformers_that_has_it(monkeypatch):
    from transformers.generation import configuration_utils

    monkeypatch.delattr(configuration_utils, "ContinuousBatchingConfig", raising=False)
    with pytest.raises(UserError, match=f"5.4 or later.*{transformers.__version__} is installed"):
        ContinuousEngine()


@continuous
def test_continuous_settings_are_checked():
    with pytest.raises(UserError, match="has no page_count"):
        ContinuousEngine(page_count=3)
    with pytest.raises(UserError, match="'continuous' has no min_response_length"):
        settings(rollout_engine="continuous", min_response_length=2).validate()


@continuous
def test_ppo_trains_on_continuous_batching():
    once = {"max_steps": 2, "num_ppo_epochs": 1, "num_mini_batches": 1}
    config = settings(rollout_engine="continuous", rollout_logprobs="check", **once)
    result = run(config, plain_model())
    first, second = result.metrics
    assert first["val/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert first["val/rollout_logprob_diff"] < 1e-5
    assert second["objective/kl"] != 0.0


class Repeating(Engine):
    """A user's own: every response is the prompt's last token, twice."""

    made: list = []

    def __init__(self, model, config):
        self.model, self.length = model, config.response_length
        self.released = 0
        Repeating.made.append(self)

    def sample(self, request):
        input_ids, attention_mask = request.input_ids, request.attention_mask
        assert request.model is self.model
        assert request.sampling.response_length == self.length
        assert request.role == "actor" and not request.with_logprobs and not request.keep_prefix
        assert len(request.seeds) == len(input_ids)
        last = input_ids[:, -1:].repeat(1, 2)
        mask = torch.ones_like(last)
        return Rollout(
            torch.cat([input_ids, last], 1),
            torch.cat([attention_mask, mask], 1),
            mask.bool(),
            torch.zeros(len(last), dtype=torch.bool),
        )

    def release(self):
        self.released += 1


def test_a_users_engine_is_named_as_module_and_factory(monkeypatch):
    module = types.ModuleType("my_engines")
    module.repeating, module.nothing = Repeating, lambda model, config: object()
    monkeypatch.setitem(sys.modules, "my_engines", module)
    monkeypatch.setattr(Repeating, "made", [])
    result = run(settings(rollout_engine="my_engines:repeating", max_steps=1), plain_model())
    (engine,) = Repeating.made
    assert engine.released == 1
    assert result.metrics[0]["objective/response_length"] == 2.0
    for name, message in (
        ("my_engines:absent", "rollout_engine: my_engines has no function absent"),
        ("no_such_module_at_all:f", "rollout_engine: cannot import no_such_module_at_all"),
        ("my_engines:nothing", "made a object, not a hydra_rlhf.rollout.Engine"),
        ("fast", "must be one of hydra, transformers, continuous, vllm, or module:factory"),
    ):
        with pytest.raises(UserError, match=message):
            run(settings(rollout_engine=name, max_steps=1), plain_model())


def test_every_engine_has_the_interface():
    for engine in (RolloutEngine, GenerateEngine, ContinuousEngine, VLLMEngine):
        assert issubclass(engine, Engine)
        assert not engine.__abstractmethods__
        assert engine.__call__ is Engine.__call__
    assert ROLLOUT_ENGINES == ("hydra", "transformers", "continuous", "vllm")


def test_an_engine_of_other_kernels_has_to_be_weighted(monkeypatch):
    """Its log-probabilities cannot stand for the trainer's."""
    sample = GenerateEngine.sample

    def foreign(self, request):
        rollout = sample(self, request)
        rollout.foreign = True
        return rollout

    monkeypatch.setattr(GenerateEngine, "sample", foreign)
    config = settings(rollout_engine="transformers", rollout_logprobs="reuse", max_steps=1)
    with pytest.raises(UserError, match="samples by other kernels"):
        run(config, plain_model())
