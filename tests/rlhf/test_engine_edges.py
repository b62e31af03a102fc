"""The engine's ends: more families, how often the host looks, what is released and refused."""

import pytest
import torch
import transformers

from hydra_kernels.replay import draw_tokens, unavailable
from hydra_rlhf.decode_state import Buffers, Prefill, Unsupported
from hydra_rlhf.engine import RolloutEngine
from hydra_rlhf.model import HydraModel, default_lora_config
from hydra_rlhf.rollout import generate, pad_left
from tests.rlhf.families import (
    _GATED,
    _SMALL,
    CONFIGS,
    EOS,
    PAD,
    VOCAB,
    make_model,
    train_by_chance,
)
from tests.rlhf.test_engine import GREEDY, PROMPTS

_EXPERTS = dict(num_experts_per_tok=3, moe_intermediate_size=16)
MORE = {
    # A layer norm, a rotary embedding of half a head, biases everywhere.
    "phi": lambda: transformers.PhiConfig(**_SMALL, intermediate_size=48),
    "gemma": lambda: transformers.GemmaConfig(**_GATED, head_dim=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **_GATED, head_dim=8, query_pre_attn_scalar=8, sliding_window=8
    ),
    # Rotary embeddings of neighbours; in GPT-J and Falcon from tables, and by lists of indices.
    **{name: CONFIGS[name] for name in ("cohere", "gptj", "falcon", "mixtral")},
    "glm4": lambda: transformers.Glm4Config(**_GATED, head_dim=8),
    # Experts beside one that every token has; others with biases, chosen out of more, and sinks.
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **_GATED, **_EXPERTS, num_experts=6, shared_expert_intermediate_size=24
    ),
    "olmoe": lambda: transformers.OlmoeConfig(**_GATED, num_experts=6, num_experts_per_tok=2),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **_GATED, head_dim=8, num_local_experts=6, num_experts_per_tok=3, sliding_window=8
    ),
}


@pytest.mark.parametrize("family", MORE)
def test_greedy_equals_generate(family):
    torch.manual_seed(0)
    lm = transformers.AutoModelForCausalLM.from_config(MORE[family]()).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    lora = default_lora_config(lm, r=4, lora_alpha=8)
    model = HydraModel(lm, adapters=("actor", "critic"), lora_config=lora)
    train_by_chance(model)
    ids, mask = pad_left(PROMPTS, PAD)
    expected = generate(model, ids, mask, GREEDY, with_logprobs=True)
    engine = RolloutEngine(model, batch_size=3, check_every=3)
    out = engine(model, ids, mask, GREEDY, with_logprobs=True)
    assert torch.equal(out.query_responses, expected.query_responses)
    torch.testing.assert_close(out.logprobs, expected.logprobs, rtol=0, atol=1e-5)
    assert bool(engine._replays) == (not unavailable())


@pytest.mark.parametrize(("every", "looks"), [(8, 3), (5, 4), (1, 19), (100, 1)])
@pytest.mark.parametrize("replay", [True, False])
def test_the_host_looks_every_few_steps(every, looks, replay, monkeypatch):
    """20 tokens are 19 steps after the prompt's; the last look is at their end."""
    if replay and unavailable():
        pytest.skip("the C++ extension is not built")
    model = make_model("llama")
    ids, mask = pad_left(PROMPTS, PAD)
    engine = RolloutEngine(model, check_every=every, replay=replay)
    counted = []
    tolist = torch.Tensor.tolist

    def counting(tensor):
        if engine._state is not None and tensor is engine._state.finished:
            counted.append(tensor)
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", counting)
    free = GREEDY._replace(stop_ids=(VOCAB - 1,), min_response_length=20)
    engine.generate(ids, mask, free)
    assert len(counted) == looks


def test_nothing_right_of_the_end():
    model = make_model("llama", ("joint",), trained=True, layers_to_transform=[2])
    ids, mask = pad_left(PROMPTS, PAD)
    sampling = GREEDY._replace(do_sample=True, stop_ids=(EOS, *range(13, 40)), pad_id=7)
    for settings in ({}, {"batch_size": 2, "check_every": 3}):
        engine = RolloutEngine(model, **settings)
        out = engine.generate(ids, mask, sampling, seeds=range(7), values=True, keep_prefix=True)
        right = torch.arange(20) >= out.lengths[:, None]
        assert right.any(1).any() and len(out.lengths.unique()) > 1
        assert (out.tokens[right] == 7).all()
        for name in ("logprobs", "sampled_logprobs", "values"):
            assert not getattr(out, name)[right].any()
        assert not out.prefix.hidden[:, ids.shape[1] :][right].any()
        assert out.prefix.hidden[:, ids.shape[1] :][~right].any(-1).all()
        last = out.tokens.gather(1, out.lengths[:, None] - 1)[:, 0]
        assert torch.equal(out.ended, torch.isin(last, torch.tensor(sampling.stop_ids)))


def test_released_activations_are_let_go():
    model = make_model("llama", trained=True, layers_to_transform=[2])
    ids, mask = pad_left(PROMPTS, PAD)
    engine = RolloutEngine(model)
    first = engine.generate(ids, mask, GREEDY, keep_prefix=True)
    state = engine._state
    engine.release()
    assert state.nbytes == 0 or engine._state is None
    again = engine.generate(ids, mask, GREEDY, keep_prefix=True)
    assert torch.equal(again.prefix.hidden, first.prefix.hidden)
    assert torch.equal(again.logprobs, first.logprobs)


def test_layers_that_cache_out_of_turn_are_refused():
    prefill = Prefill(Buffers(2, 5, torch.device("cpu")), torch.arange(2))
    keys = torch.zeros(2, 3, 4, 8)
    prefill.update(keys, keys, 0)
    with pytest.raises(Unsupported, match="layer 2 caches out of turn"):
        prefill.update(keys, keys, 2)


def test_a_draw_at_the_end_of_the_line():
    """The largest uniform never falls on a token of no probability."""
    logits = torch.randn(64, 50)
    logits[:, 20:] = -torch.inf
    uniforms = torch.full((64, 1), 1.0 - 2**-24)
    token, logprob, _ = draw_tokens(logits, uniforms, torch.zeros(64, 1, dtype=torch.long))
    assert token.max() < 20 and logprob.isfinite().all()
