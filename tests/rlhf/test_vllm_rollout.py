"""Against vLLM itself where it is installed, and everywhere against a stand-in of its interface."""

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hydra_rlhf import experience
from hydra_rlhf.config import PPOConfig
from hydra_rlhf.engine import RolloutEngine
from hydra_rlhf.errors import UserError
from hydra_rlhf.lora import default_lora_config
from hydra_rlhf.model import HydraModel
from hydra_rlhf.rollout import Rollout, Sampling, pad_left
from hydra_rlhf.vllm_rollout import VLLMEngine, importance_weights
from tests.rlhf import vllm_stand_in
from tests.rlhf.families import EOS, PAD, PROMPTS, make_lm, make_model, train_by_chance
from tests.rlhf.test_ppo import plain_model, run, settings
from tests.rlhf.vllm_stand_in import LLM, SamplingParams

SAMPLING = Sampling(6, 0.7, (EOS,), PAD)
GREEDY = SAMPLING._replace(do_sample=False)
# Heads of 32, the smallest that vLLM's attention on a CPU has.
WIDE = dict(hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32)
TOKENS = [[5, 6, 7], [8] * 6, [3, 4]]
# Sums in another order than ours; over 1,200 rows of vLLM 0.32, 1.6e-5 was the most.
ATOL = 5e-5

REAL = importlib.util.find_spec("vllm") is not None
KINDS = (
    "stand-in",
    pytest.param("vllm", marks=pytest.mark.skipif(not REAL, reason="vLLM is not installed")),
)


def put_in(kind: str, patch: pytest.MonkeyPatch) -> None:
    if kind == "stand-in":
        for name, module in vllm_stand_in.modules().items():
            patch.setitem(sys.modules, name, module)
        patch.setattr(LLM, "made", [])


@pytest.fixture
def vllm(monkeypatch):
    put_in("stand-in", monkeypatch)


@pytest.fixture
def base(tmp_path) -> str:
    make_model("llama", ()).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture(scope="module", params=KINDS)
def engine(request, tmp_path_factory):
    """Loaded once: vLLM takes most of a minute. The model's folder has a reward head."""
    folder = str(tmp_path_factory.mktemp("vllm") / "base")
    plain_model(num_hidden_layers=3, **WIDE).save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        put_in(request.param, patch)
        made = VLLMEngine(folder)
        yield made
        made.close()


@pytest.fixture
def model() -> HydraModel:
    lm = make_lm("llama", **WIDE)
    config = default_lora_config(lm, r=4, lora_alpha=8)
    head = torch.nn.Linear(64, 1, bias=False)
    made = HydraModel(lm, adapters=("actor", "critic"), lora_config=config, reward_head=head)
    train_by_chance(made)
    return made


def scored(model: HydraModel, out: Rollout, role: str, temperature: float = 0.7) -> torch.Tensor:
    found = model.score(
        out.query_responses,
        out.attention_mask,
        out.response_mask,
        roles=(role,),
        temperature=temperature,
    )
    logprobs = found.logprobs if role == "actor" else found.ref_logprobs
    assert logprobs is not None
    return logprobs.detach()


def responses(out: Rollout) -> list[list[int]]:
    rows = out.query_responses[:, out.context_length :]
    return [row[kept].tolist() for row, kept in zip(rows, out.response_mask, strict=True)]


def test_samples_under_the_adapter_as_it_is_now(engine, model):
    ids, mask = pad_left(TOKENS, PAD)
    before = None
    for role in ("actor", "reference", "actor", "actor"):
        out = engine(model, ids, mask, SAMPLING, role=role, seeds=[4, 9, 2])
        assert out.foreign
        torch.testing.assert_close(out.logprobs, scored(model, out, role), rtol=0, atol=ATOL)
        other = scored(model, out, "reference" if role == "actor" else "actor")
        assert (out.logprobs - other).abs().max() > 0.1
        if role == "actor":
            assert before is None or (out.logprobs - before(out)).abs().max() > 0.05
            old = {n: p.clone() for n, p in model.base.named_parameters() if "lora_" in n}

            def before(out: Rollout, old: dict = old) -> torch.Tensor:
                """Under the weights that were handed over last."""
                now = {n: p.clone() for n, p in model.base.named_parameters() if n in old}
                model.base.load_state_dict(old, strict=False)
                found = scored(model, out, "actor")
                model.base.load_state_dict(now, strict=False)
                return found

            with torch.no_grad():
                for parameter in model.adapter_parameters("actor"):
                    parameter.mul_(1.3)


def test_greedy_tokens_are_those_of_our_own_engine(engine, model):
    ids, mask = pad_left(TOKENS, PAD)
    for role in ("actor", "reference"):
        own = RolloutEngine(model)(model, ids, mask, GREEDY, role=role, with_logprobs=True)
        out = engine(model, ids, mask, GREEDY, role=role, with_logprobs=True)
        assert torch.equal(out.query_responses, own.query_responses)
        assert torch.equal(out.response_mask, own.response_mask)
        # Of the temperature too, which vLLM leaves out of its own.
        torch.testing.assert_close(out.logprobs, own.logprobs, rtol=0, atol=ATOL)
    out = engine(model, ids, mask, GREEDY)
    assert out.logprobs is None and not out.foreign


def test_a_prompts_tokens_depend_on_its_own_seed(engine, model):
    ids, mask = pad_left(TOKENS, PAD)
    first = responses(engine(model, ids, mask, SAMPLING, seeds=[1, 2, 3]))
    assert first == responses(engine(model, ids, mask, SAMPLING, seeds=[1, 2, 3]))
    assert first[1:2] == responses(engine(model, ids[1:2], mask[1:2], SAMPLING, seeds=[2]))
    assert first[0] != responses(engine(model, ids, mask, SAMPLING, seeds=[7, 2, 3]))[0]
    torch.manual_seed(0)
    drawn = responses(engine(model, ids, mask, SAMPLING))
    assert drawn != responses(engine(model, ids, mask, SAMPLING))
    torch.manual_seed(0)
    assert drawn == responses(engine(model, ids, mask, SAMPLING))


def test_rows_end_at_their_stop_token_which_counts(engine, model):
    ids, mask = pad_left(TOKENS, PAD)
    seeds = [1, 2, 3]
    free = responses(engine(model, ids, mask, SAMPLING._replace(stop_ids=(96,)), seeds=seeds))
    assert [len(row) for row in free] == [6, 6, 6]
    # EOS as any other: only stop_ids end a response.
    for stops in ((free[0][2],), (free[0][2], EOS, free[1][4])):
        out = engine(model, ids, mask, SAMPLING._replace(stop_ids=stops), seeds=seeds)
        for row, whole, ended in zip(responses(out), free, out.ended, strict=True):
            ends = [i for i, token in enumerate(whole) if token in stops]
            assert row == (whole[: ends[0] + 1] if ends else whole)
            assert ended == bool(ends)
        assert out.ended[0]
        rows = out.query_responses[:, ids.shape[1] :]
        assert (rows[~out.response_mask] == PAD).all()
        assert (out.logprobs[~out.response_mask] == 0).all()
        assert torch.equal(out.attention_mask[:, : ids.shape[1]], mask)
    late = SAMPLING._replace(stop_ids=tuple(range(1, 90)), min_response_length=3)
    out = engine(model, ids, mask, late, seeds=seeds)
    assert (out.response_mask.sum(-1) >= 4).all()
    assert all(token in (0, *range(90, 97)) for row in responses(out) for token in row[:3])


@pytest.mark.parametrize("changes", [{"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2}], ids=str)
def test_logprobs_are_of_what_was_drawn_from(engine, model, changes):
    """Its policy's loss has to be weighted against the filtered distribution."""
    ids, mask = pad_left([[5, 6, 7]] * 8, PAD)
    sampling = SAMPLING._replace(response_length=1, **changes)
    out = engine(model, ids, mask, sampling, seeds=range(8))
    with torch.no_grad():
        hidden = model.hidden(ids[:1], mask[:1], role="actor")[:, -1]
        probs = (model.lm_head.logits(hidden)[0].float() / 0.7).softmax(-1)
    ordered = probs.sort(descending=True).values
    kept = {
        "top_k": ordered[:5],
        "top_p": ordered[ordered.cumsum(0) - ordered < 0.6],
        "min_p": ordered[ordered >= 0.2 * ordered[0]],
    }[next(iter(changes))]
    assert 1 < len(kept) < len(probs)
    expected = (probs[out.query_responses[:, -1]] / kept.sum()).log()
    torch.testing.assert_close(out.logprobs[:, 0], expected, rtol=0, atol=ATOL)
    assert len(set(out.query_responses[:, -1].tolist())) > 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"temperature": 0.005}, "vLLM's lowest is 0.01"),
        ({"temperature": 2.5}, r"vLLM \S+ cannot sample from .* \(temperature must be in \[0, 2\]"),
        ({"response_length": 62}, "max_model_len is at most 64, not 68"),
    ],
)
def test_settings_out_of_its_reach_leave_it_running(engine, model, changes, message):
    ids, mask = pad_left(TOKENS, PAD)
    with pytest.raises(UserError, match=message):
        engine(model, ids, mask, SAMPLING._replace(**changes))
    assert engine(model, ids, mask, SAMPLING).ended.shape == (3,)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["hydra-ppo", "lora-ppo"])
def test_trains_on_what_vllm_samples(kind, method, tmp_path, monkeypatch):
    """Where vLLM's log-probabilities are the trainer's, all weights are 1.

    lora-ppo's reference is a model without adapters, which samples when it is evaluated.
    """
    put_in(kind, monkeypatch)
    model = plain_model(**WIDE)
    model.save_pretrained(tmp_path / "sft")
    config = hydra_config(str(tmp_path / "sft"), method=method, eval_steps=2, num_eval_prompts=3)
    result = run(config, model, eval_prompts=PROMPTS[:3])
    first, second = result.metrics
    assert first["val/ratio"] == 1.0
    assert max(first["val/rollout_logprob_diff"], second["val/rollout_logprob_diff"]) < ATOL
    assert second["objective/kl"] != 0.0  # the adapter that was handed over has moved
    if kind == "stand-in":
        assert LLM.made[0].requests[1].lora_int_id == 2
        assert LLM.made[0].requests[-1] is None


def test_what_vllm_is_given(vllm, base):
    model = make_model("llama", trained=True)
    ids, mask = pad_left([[5, 6, 7], [8] * 6], PAD)
    engine = VLLMEngine(base)
    assert engine.nbytes == 0
    for role in ("actor", "reference", "actor"):
        sampling = SAMPLING._replace(top_k=20, stop_ids=(EOS, 13))
        engine(model, ids, mask, sampling, role=role, seeds=[4, 9])
    (llm,) = LLM.made
    # Two blocks for two rows, and two more; keys and values of 3 layers, 2 heads of 8, float32.
    room = 4 * 128 * 2 * 3 * 2 * 8 * 4
    assert llm.settings == {
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "max_model_len": 24,
        "kv_cache_memory_bytes": room,
        "gpu_memory_utilization": 0.01,
        "enable_sleep_mode": False,
        "enable_lora": True,
        "max_lora_rank": 8,  # of rank 4, which vLLM does not know
        "logprobs_mode": "processed_logprobs",
        "max_logprobs": 1,
    }
    assert engine.nbytes == room
    assert [None if r is None else r.lora_int_id for r in llm.requests] == [1, None, 2]
    assert not Path(llm.requests[0].lora_path).exists()  # nothing is left behind
    assert [p.seed for p in llm.params] == [4, 9]
    assert llm.params[0] == SamplingParams(6, 0, 0.7, 20, 1.0, 0.0, [EOS, 13], True, 0, 4, False)
    engine.release()
    assert llm.events == [] and engine.nbytes == room


def test_sleeps_between_calls_where_vllm_can(vllm, base, monkeypatch):
    monkeypatch.setattr(LLM, "can_sleep", True)
    model = make_model("llama", trained=True)
    ids, mask = pad_left([[5, 6, 7]], PAD)
    engine = VLLMEngine(base)
    engine.release()
    engine(model, ids, mask, SAMPLING)
    engine.release()
    engine.release()
    assert engine.nbytes == 0
    engine(model, ids, mask, SAMPLING)
    assert engine.nbytes > 0
    engine.close()
    assert LLM.made[0].events == ["sleep", "wake_up", "shutdown"] and engine.nbytes == 0
    awake = VLLMEngine(base, enable_sleep_mode=False, kv_cache_memory_bytes=None)
    awake(model, ids, mask, SAMPLING)
    awake.release()
    assert LLM.made[1].events == [] and awake.nbytes == 0  # as many as vLLM chose


def test_is_loaded_again_for_what_has_outgrown_it(vllm, base):
    model = make_model("llama", trained=True)
    engine = VLLMEngine(base)
    for width, count in ((3, 1), (12, 1), (13, 2), (40, 3), (58, 3)):
        out = engine(model, *pad_left([[5] * width], PAD), SAMPLING._replace(stop_ids=(96,)))
        assert out.response_mask.sum() == 6 and len(LLM.made) == count
    engine(make_model("llama", r=9), *pad_left([[5]], PAD), SAMPLING)
    engine(model, *pad_left([[5]], PAD), SAMPLING)
    assert [llm.settings["max_model_len"] for llm in LLM.made] == [18, 38, 64, 14]
    assert [llm.settings["max_lora_rank"] for llm in LLM.made] == [8, 8, 8, 16]
    assert [llm.events for llm in LLM.made] == [["shutdown"]] * 3 + [[]]
    fixed = VLLMEngine(base, max_model_len=16)
    with pytest.raises(UserError, match="max_model_len is at most 16, not 17"):
        fixed(model, *pad_left([[5] * 11], PAD), SAMPLING)


def test_errors_that_say_what_to_do(vllm, base, tmp_path, monkeypatch):
    plain = make_model("llama", ())
    ids, mask = pad_left([[5, 6, 7]], PAD)
    with pytest.raises(UserError, match="methods with adapters"):
        VLLMEngine(base)(plain, ids, mask, SAMPLING)
    with pytest.raises(UserError, match="sft_model_path"):
        VLLMEngine(None)
    model = make_model("llama")
    with pytest.raises(UserError, match=re.escape("(max_lora_rank Input should be 1, 8, 16")):
        VLLMEngine(base, max_lora_rank=4)(model, ids, mask, SAMPLING)
    make_lm("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match="GPT2LMHeadModel does not support LoRA yet"):
        VLLMEngine(str(tmp_path / "gpt2"))(make_model("gpt2"), ids, mask, SAMPLING)
    dora = make_model("llama", use_dora=True)
    engine = VLLMEngine(base)
    with pytest.raises(UserError, match="does not yet support DoRA.*take rollout_engine 'hydra'"):
        engine(dora, ids, mask, SAMPLING)
    # vLLM goes on with the request that failed before any other.
    assert LLM.made[-1].events == ["shutdown"]
    engine(model, ids, mask, SAMPLING)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match="pip install vllm"):
        VLLMEngine(base)


def test_importance_weights_by_hand():
    mask = torch.tensor([[True, True, True, False]])
    new = torch.tensor([[-1.0, -1.0, -1.0, float("nan")]])
    old = torch.tensor([[-1.0, -3.0, -0.5, 0.0]])
    weights = importance_weights(new, old, mask, 2.0)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 2.0, 0.60653066, 1.0]]))


def hydra_config(base: str, **changes: Any) -> PPOConfig:
    changes = {"max_steps": 2, "num_ppo_epochs": 1, "num_mini_batches": 1, **changes}
    return settings(rollout_engine="vllm", sft_model_path=base, **changes)


def test_a_mismatch_weighs_the_policy_loss(vllm, tmp_path, monkeypatch):
    """vLLM's log-probabilities e times too high and too low; 2 is where weights are cut."""
    plain_model().save_pretrained(tmp_path / "sft")
    kept = []
    make = experience.Experience

    def keep(*args):
        kept.append(args[3])  # advantages
        return make(*args)

    monkeypatch.setattr(experience, "Experience", keep)
    for off in (0.0, 1.0, -1.0):
        monkeypatch.setattr(LLM, "off", off)
        run(hydra_config(str(tmp_path / "sft"), max_steps=1), plain_model())
    equal, high, low = kept
    assert equal.std() > 0.5
    torch.testing.assert_close(high, equal * 0.36787944, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(low, equal * 2.0, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rollout_logprobs": "reuse"}, "needs rollout_logprobs 'recompute'"),
        ({"method": "ppo"}, "methods with adapters"),
        ({"importance_cap": 0.0}, "importance_cap must be above 0"),
    ],
)
def test_settings_that_cannot_work(changes, message):
    with pytest.raises(UserError, match=message):
        hydra_config("somewhere", **changes).validate()
