"""Settings at their ends, one engine for many settings, and what a recorded step depends on."""

import logging
from types import SimpleNamespace

import pytest
import torch
import transformers

from hydra_kernels.peft import FusedLinear
from hydra_kernels.replay import Replay, unavailable
from hydra_rlhf.decodable import Unsupported, check_config
from hydra_rlhf.decode_state import Prefill
from hydra_rlhf.engine import RolloutEngine
from hydra_rlhf.engines import GenerateEngine
from hydra_rlhf.model import HydraModel, default_lora_config
from hydra_rlhf.replayed import fingerprint, recorded
from hydra_rlhf.rollout import generate, pad_left
from tests.rlhf.families import (
    _GATED,
    _SMALL,
    EOS,
    PAD,
    VOCAB,
    make_lm,
    make_model,
    train_by_chance,
)
from tests.rlhf.test_engine import GREEDY, PROMPTS, prompts

SAMPLED = GREEDY._replace(do_sample=True)
MANY_STOPS = tuple(range(1, 60))
PIECEMEAL = {"batch_size": 2, "check_every": 3, "bucket": 4, "replay": False}
replayed = pytest.mark.skipif(bool(unavailable()), reason="the C++ extension is not built")


def check_equal(model, sampling, given, settings) -> None:
    expected = generate(model, *given, sampling, with_logprobs=True)
    out = RolloutEngine(model, **settings)(model, *given, sampling, with_logprobs=True)
    assert torch.equal(out.query_responses, expected.query_responses)
    assert torch.equal(out.attention_mask, expected.attention_mask)
    assert torch.equal(out.response_mask, expected.response_mask)
    assert torch.equal(out.ended, expected.ended)
    torch.testing.assert_close(out.logprobs, expected.logprobs, rtol=0, atol=1e-5)


ODD = {
    "no stop token": GREEDY._replace(stop_ids=()),
    "the padding stops": GREEDY._replace(stop_ids=(PAD, EOS)),
    "padded with what stops": GREEDY._replace(pad_id=13),
    "a stop token that the model lacks": GREEDY._replace(
        stop_ids=(VOCAB, EOS), min_response_length=3
    ),
    "stops from the fourth token on": GREEDY._replace(stop_ids=MANY_STOPS, min_response_length=3),
    "stops at the last token alone": GREEDY._replace(stop_ids=MANY_STOPS, min_response_length=19),
    "never stops": GREEDY._replace(stop_ids=MANY_STOPS, min_response_length=20),
    "cold": SAMPLED._replace(temperature=1e-6),
    "the first of one": SAMPLED._replace(top_k=1),
    "a nucleus of none": SAMPLED._replace(top_p=0.0),
    "as likely as the likeliest": SAMPLED._replace(min_p=1.0),
    "more than the vocabulary": GREEDY._replace(top_k=10**6),
    "greedy in spite of filters": GREEDY._replace(top_k=3, top_p=0.5, min_p=0.2),
}


@pytest.mark.parametrize("settings", [{}, PIECEMEAL], ids=["replayed", "piecemeal"])
@pytest.mark.parametrize("sampling", ODD.values(), ids=ODD)
def test_odd_settings_equal_generate(sampling, settings):
    """Where one token has all the probability, sampling is greedy too."""
    model = make_model("llama", trained=True)
    check_equal(model, sampling._replace(response_length=20), prompts(), settings)


@pytest.mark.parametrize("settings", [{}, PIECEMEAL], ids=["replayed", "piecemeal"])
@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_a_window_that_only_the_response_leaves(family, settings):
    """Of 8 tokens, after prompts of 4 and of one."""
    model = make_model(family, trained=True)
    for some in ([[5, 6, 7, 8], [9]], [[5], [6], [7]]):
        check_equal(model, GREEDY, pad_left(some, PAD), settings)


def test_a_window_that_is_configured_and_not_used():
    """Qwen2-MoE then has one of 0."""
    torch.manual_seed(0)
    experts = dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=24)
    config = transformers.Qwen2MoeConfig(**_GATED, **experts, shared_expert_intermediate_size=24)
    assert config.sliding_window == 0
    lm = transformers.AutoModelForCausalLM.from_config(config).eval()
    check_equal(HydraModel(lm), GREEDY._replace(response_length=5), prompts(3), {})


def test_a_window_that_no_layer_has():
    torch.manual_seed(0)
    kinds = ["full_attention"] * 3
    config = transformers.Olmo3Config(**_GATED, layer_types=kinds, sliding_window=4)
    lm = transformers.AutoModelForCausalLM.from_config(config).eval()
    for settings in ({}, PIECEMEAL):
        check_equal(HydraModel(lm), GREEDY._replace(response_length=5), prompts(3), settings)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma2", {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}),
        ("cohere", {"logit_scale": 0.3}),
        ("granite", {"logits_scaling": 4.0, "attention_multiplier": 0.2}),
        ("phi", {}),
        ("gpt2", {}),
    ],
)
def test_log_probabilities_are_those_of_scoring(family, changes):
    """Of logits that are capped, scaled or have a bias: below 1e-4 is promised in float32."""
    lm = make_lm(family, **changes)
    lora = default_lora_config(lm, r=4, lora_alpha=8)
    model = HydraModel(lm, adapters=("actor", "critic"), lora_config=lora)
    train_by_chance(model)
    sampling = SAMPLED._replace(temperature=0.7, stop_ids=(EOS,))
    out = RolloutEngine(model)(model, *prompts(), sampling, with_logprobs=True, seeds=range(7))
    sequences = out.query_responses, out.attention_mask, out.response_mask
    with torch.no_grad():
        scored = model.score(*sequences, roles=("actor",), temperature=0.7).logprobs
    assert (out.logprobs - scored).abs().max() < 2e-5 and scored.min() < -1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"response_length": 0}, "response_length must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be at least 1.2e-38, got 0.0; the likeliest"),
        ({"temperature": 1e-39}, "temperature must be"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"top_p": -0.1}, r"top_p must be in \[0, 1\], got -0.1"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\], got 1.5"),
    ],
)
def test_what_no_distribution_has_is_refused(changes, message):
    model = make_model("llama")
    sampling = GREEDY._replace(**changes)
    for run in (
        lambda: RolloutEngine(model)(model, *prompts(), sampling),
        lambda: RolloutEngine(model).generate(*prompts(), sampling),
        lambda: GenerateEngine()(model, *prompts(), sampling),
        lambda: generate(model, *prompts(), sampling),
    ):
        with pytest.raises(ValueError, match=message):
            run()


def test_no_prompts_and_no_rows_are_refused():
    model = make_model("llama")
    ids, mask = prompts()
    with pytest.raises(ValueError, match="no prompts"):
        RolloutEngine(model).generate(ids[:0], mask[:0], GREEDY)
    for name in ("batch_size", "check_every", "bucket"):
        for count in (0, -1):
            with pytest.raises(ValueError, match=f"{name} must be at least 1, got {count}"):
                RolloutEngine(model, **{name: count})


def test_one_engine_obeys_the_settings_of_each_call():
    """The buffers and the recorded step of a call serve the next one where they fit."""
    model = make_model("llama", ("joint",), trained=True, layers_to_transform=[2])
    engine = RolloutEngine(model)
    ids, mask = prompts(3)
    never = SAMPLED._replace(stop_ids=())  # fills its buffers
    calls = [
        (GREEDY, (ids, mask)),
        (GREEDY._replace(stop_ids=MANY_STOPS), (ids, mask)),
        (SAMPLED, (ids, mask)),
        (SAMPLED._replace(temperature=0.3), (ids, mask)),
        (SAMPLED._replace(top_k=2), (ids, mask)),
        (SAMPLED._replace(min_response_length=4, stop_ids=MANY_STOPS), (ids, mask)),
        (never, pad_left(PROMPTS[3:5], PAD)),
        (never, (ids[:2], mask[:2])),
        (never, (ids, mask)),
        (GREEDY, (ids, mask)),  # after which the next round asks for more of the same
    ]
    wanted = []
    for sampling, given in calls:
        options = dict(seeds=range(len(given[0])), values=True, keep_prefix=True)
        wanted.append(RolloutEngine(model).generate(*given, sampling, **options))
    for values, keep_prefix in ((False, False), (True, False), (True, True)):
        for (sampling, given), fresh in zip(calls, wanted, strict=True):
            options = dict(seeds=range(len(given[0])), values=values, keep_prefix=keep_prefix)
            out = engine.generate(*given, sampling, **options)
            assert torch.equal(out.tokens, fresh.tokens)
            torch.testing.assert_close(out.logprobs, fresh.logprobs, rtol=0, atol=1e-6)
            assert (out.values is not None) == values
            assert (out.prefix is not None) == keep_prefix
            if values:
                torch.testing.assert_close(out.values, fresh.values, rtol=0, atol=1e-6)


def test_as_wide_as_the_longest_response():
    model = make_model("llama", trained=True, layers_to_transform=[2])
    ids, mask = prompts()
    sampling = SAMPLED._replace(stop_ids=MANY_STOPS)
    options = dict(seeds=range(7), with_logprobs=True, keep_prefix=True)
    engine = RolloutEngine(model)
    out = engine(model, ids, mask, sampling, **options)
    width = int(out.response_mask.sum(-1).max())
    assert width < 20
    assert out.response_mask.shape == out.logprobs.shape == (7, width)
    assert out.query_responses.shape == out.prefix.hidden.shape[:2] == (7, 9 + width)
    assert engine._entering._hidden is None  # the prompts' activations are not held on to
    assert engine(model, ids, mask, sampling).logprobs is None


def test_dropout_is_off_in_training():
    model = make_model("gpt2", trained=True, lora_dropout=0.5)
    expected = generate(model, *prompts(), GREEDY)
    for replay in (True, False):
        model.train()
        out = RolloutEngine(model, replay=replay)(model, *prompts(), GREEDY)
        assert model.trunk.training
        assert torch.equal(out.query_responses, expected.query_responses)


def test_falling_back_obeys_the_request(monkeypatch):
    """A model whose last block keeps no keys and values, as some share those of an earlier one."""
    model = make_model("llama", trained=True)
    update = Prefill.update

    def shares(self, keys, values, layer, *args, **kwargs):
        return (keys, values) if layer == 2 else update(self, keys, values, layer)

    monkeypatch.setattr(Prefill, "update", shares)
    engine = RolloutEngine(model)
    with pytest.raises(Unsupported, match="LlamaModel caches 2 of 3 layers"):
        engine.generate(*prompts(), GREEDY)
    outs = {}
    for role in ("actor", "reference"):
        outs[role] = engine(model, *prompts(), GREEDY, role=role, with_logprobs=True)
        expected = generate(model, *prompts(), GREEDY, role=role, with_logprobs=True)
        assert torch.equal(outs[role].query_responses, expected.query_responses)
        assert torch.equal(outs[role].logprobs, expected.logprobs)
    assert not torch.equal(outs["actor"].query_responses, outs["reference"].query_responses)


def test_what_sees_more_than_the_masks_is_refused():
    for config in (
        transformers.BloomConfig(),
        transformers.FalconConfig(alibi=True),
        transformers.GPTNeoConfig(),
    ):
        with pytest.raises(Unsupported):
            check_config(config, 1)
    check_config(transformers.FalconConfig(alibi=False), 1)
    plain = transformers.GPTNeoConfig(num_layers=2, attention_types=[[["global", "global"], 1]])
    check_config(plain, 1)


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
LONGROPE |= {"rope_theta": 1e4, "original_max_position_embeddings": 29}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.Phi3Config(**_GATED, original_max_position_embeddings=29,
                                 rope_parameters=LONGROPE), "past 29 tokens"),
        (transformers.LlamaConfig(**{**_GATED, "max_position_embeddings": 29},
                                  rope_parameters=DYNAMIC), "past 29 tokens"),
        (transformers.Lfm2Config(**_GATED, layer_types=["conv", "full_attention", "conv"]),
         "layers of conv"),
        (transformers.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2),
         "MambaModel keeps more of the past than keys and values"),
        (transformers.OpenAIGPTConfig(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4),
         "OpenAIGPTModel keeps no keys and values"),
        (transformers.BertConfig(**_SMALL, intermediate_size=48), "BertModel is an encoder"),
    ],
    ids=["longrope", "dynamic", "conv", "mamba", "no cache", "encoder"],
)  # fmt: skip
def test_models_with_another_past_run_by_generate(config, message, caplog):
    """Frequencies of rotary embeddings too may hang on how long the sequences have become."""
    torch.manual_seed(0)
    model = HydraModel(transformers.AutoModelForCausalLM.from_config(config).eval())
    ids, mask = prompts(3)
    shorter, longer = (GREEDY._replace(response_length=n, stop_ids=(VOCAB,)) for n in (20, 21))
    with caplog.at_level(logging.WARNING):
        engine = RolloutEngine(model)
        if "tokens" in message:  # 9 and 20 are not past 29
            out = engine(model, ids, mask, shorter)
            assert torch.equal(
                out.query_responses, generate(model, ids, mask, shorter).query_responses
            )
            assert "rollouts run" not in caplog.text
        engine(model, ids, mask, longer)
        with pytest.raises(Unsupported):
            engine.generate(ids, mask, longer)
    (said,) = [r.getMessage() for r in caplog.records if "rollouts run" in r.getMessage()]
    assert message in said


def test_a_look_every_few_steps_when_rows_take_turns(monkeypatch):
    """And one for each time that rows end: a waiting prompt starts its own count."""
    model = make_model("llama")
    engine = RolloutEngine(model, batch_size=2, check_every=5)
    looks, steps = [], []
    tolist, advance = torch.Tensor.tolist, RolloutEngine._advance

    def looking(tensor):
        if engine._state is not None and tensor is engine._state.finished:
            looks.append(1)
        return tolist(tensor)

    def advancing(self, state):
        steps.append(1)
        advance(self, state)

    monkeypatch.setattr(torch.Tensor, "tolist", looking)
    monkeypatch.setattr(RolloutEngine, "_advance", advancing)
    never = GREEDY._replace(stop_ids=())
    engine.generate(*prompts(), never)
    assert len(steps) == 4 * 19  # 7 prompts, two at a time, the first token by the prompt's pass
    assert len(looks) == 4 * 4


# ---- what a recorded step depends on


@replayed
def test_a_replay_that_is_not_a_number_is_not_used(monkeypatch, caplog):
    model = make_model("llama", trained=True)
    call = Replay.__call__

    def wrong(self):
        call(self)
        self.outputs[1][0, 0] = torch.nan

    monkeypatch.setattr(Replay, "__call__", wrong)
    engine = RolloutEngine(model)
    out = engine(model, *prompts(), GREEDY)
    assert torch.equal(out.query_responses, generate(model, *prompts(), GREEDY).query_responses)
    assert "its replay is nan off" in caplog.text and not engine._replays


def test_a_fingerprint_sees_every_change():
    model = make_model("llama", trained=True)
    layer = next(m for m in model.base.modules() if isinstance(m, FusedLinear))
    seen = [fingerprint(model)]

    def changed() -> bool:
        seen.append(fingerprint(model))
        return seen[-1] not in seen[:-1]

    assert not changed()  # nothing was
    layer.weight.data = layer.weight.data.clone()
    assert changed()
    rotary = model.trunk.rotary_emb
    rotary.inv_freq = rotary.inv_freq.clone()
    assert changed()
    layer.scaling["critic"] *= 2.0
    assert changed()
    layer.merge(adapter_names=["actor"])
    assert changed()
    layer.enable_adapters(False)
    assert changed()
    model.config._attn_implementation = "eager"
    assert changed()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert changed()


@replayed
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_replay_under_autocast(family):
    """No farther from float32 than PyTorch's autocast is, before and after weights that train."""
    model = make_model(family, trained=True)
    for parameter in model.trunk.parameters():
        parameter.requires_grad_(True)  # autocast keeps copies of those alone
    sampling = SAMPLED._replace(response_length=6, stop_ids=(VOCAB - 1,))
    engines = [RolloutEngine(model, replay=replay) for replay in (True, False)]
    for _ in range(2):
        errors = []
        for engine in engines:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = engine(model, *prompts(), sampling, with_logprobs=True, seeds=range(7))
            with torch.no_grad():
                exact = model.score(
                    out.query_responses, out.attention_mask, out.response_mask, roles=("actor",)
                )
            off = (out.logprobs - exact.logprobs)[out.response_mask]
            errors.append(off.square().mean().sqrt())
        assert errors[0] <= errors[1] and errors[0] < 0.1, errors
        assert engines[0]._replays
        with torch.no_grad():
            for parameter in model.trunk.parameters():
                parameter.mul_(-0.9)


@replayed
def test_experts_are_as_they_were_after_recording():
    """Each row's experts by their numbers only while a step is recorded, also where that fails."""
    model = make_model("mixtral", trained=True)
    before = model.config._experts_implementation
    assert before != "batched_mm"
    engine = RolloutEngine(model)
    engine.generate(*prompts(), GREEDY._replace(response_length=3))
    assert engine._replays and model.config._experts_implementation == before

    def fails():
        assert model.config._experts_implementation == "batched_mm"
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        recorded(model, fails, torch.float32)
    assert model.config._experts_implementation == before


@replayed
def test_what_lies_in_memory_taken_again_does_not_matter(monkeypatch):
    """Gemma 2 multiplies by the keys of every slot, those too that its mask hides."""
    model = make_model("gemma2", trained=True, layers_to_transform=[2])
    engine = RolloutEngine(model)
    first = engine.generate(*prompts(), GREEDY, keep_prefix=True)
    resize = torch.UntypedStorage.resize_

    def resized(storage, size):
        resize(storage, size)
        storage.fill_(255)  # NaN
        return storage

    engine.release()
    state = engine._state
    assert state.prefix.untyped_storage().nbytes() == 0 and engine.nbytes == 0
    monkeypatch.setattr(torch.UntypedStorage, "resize_", resized)
    again = engine.generate(*prompts(), GREEDY, keep_prefix=True)
    assert engine._state is state
    assert torch.equal(again.tokens, first.tokens) and torch.equal(again.logprobs, first.logprobs)
    assert torch.equal(again.prefix.hidden, first.prefix.hidden)


def test_no_prefix_where_no_block_has_an_adapter(monkeypatch):
    model = make_model("llama")
    monkeypatch.setattr(model, "first_adapted_layer", lambda: 3)
    assert RolloutEngine(model).generate(*prompts(), GREEDY, keep_prefix=True).prefix is None


def test_generate_of_a_minimum_keeps_the_policys_log_probabilities():
    """Those before the stop tokens are taken away, as scoring has them."""
    model = make_model("llama", trained=True)
    sampling = SAMPLED._replace(stop_ids=MANY_STOPS, min_response_length=6, temperature=0.7)
    torch.manual_seed(0)
    out = generate(model, *prompts(), sampling, with_logprobs=True)
    with torch.no_grad():
        scored = model.score(
            out.query_responses, out.attention_mask, out.response_mask, roles=("actor",),
            temperature=0.7,
        )  # fmt: skip
    assert out.response_mask.sum(-1).min() >= 7
    torch.testing.assert_close(out.logprobs, scored.logprobs, rtol=0, atol=1e-5)


# ---- capture, without a device that captures


class FakeGraph:
    """Takes the place of a CUDA graph: what was captured runs again when it is replayed."""

    def replay(self):
        self.run()


class FakeCuda:
    """As much of torch.cuda as a capture uses, on the CPU."""

    def __init__(self, monkeypatch):
        nothing = SimpleNamespace(wait_stream=lambda other: None)
        context = lambda *args, **kwargs: torch.no_grad()  # noqa: E731
        for name, value in {
            "device": context,
            "graph_pool_handle": lambda: 1,
            "current_stream": lambda: nothing,
            "stream": context,
            "CUDAGraph": FakeGraph,
            "graph": context,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr("hydra_rlhf.replayed._side_stream", lambda device: nothing)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_capture_leaves_the_state_as_it_was(family, monkeypatch):
    """Warming up runs real tokens; here even the capture itself does."""
    FakeCuda(monkeypatch)
    capture = RolloutEngine._capture
    kept = []

    def captured(self, state, seen, sampling):
        tensors = {**state.changing(), "slot": state.cache.slot}
        before = {name: t.clone() for name, t in tensors.items()}
        graph = capture(self, state, seen, sampling)
        for name, tensor in tensors.items():
            assert torch.equal(tensor, before[name]), name
        graph.run = lambda: self._token(state, seen, sampling)
        kept.append(seen)
        return graph

    monkeypatch.setattr(RolloutEngine, "_capture", captured)
    model = make_model(family, ("joint",), trained=True, layers_to_transform=[2])
    settings = dict(graph=True, replay=False, bucket=8, batch_size=3, check_every=3, keep=10**9)
    engine, plain = RolloutEngine(model, **settings), RolloutEngine(model, replay=False)
    sampling = SAMPLED._replace(temperature=0.7)
    options = dict(seeds=range(7), values=True, keep_prefix=True)
    out, expected = (e.generate(*prompts(), sampling, **options) for e in (engine, plain))
    assert kept == [24, 32, 40]
    assert torch.equal(out.tokens, expected.tokens)
    for name in ("logprobs", "values"):
        torch.testing.assert_close(getattr(out, name), getattr(expected, name), rtol=0, atol=1e-5)
    assert out.prefix.hidden.shape == expected.prefix.hidden.shape == (7, 29, 32)
