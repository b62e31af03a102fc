"""Against a stand-in for vLLM: its classes and their arguments, over transformers' generate."""

import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from hydra_rlhf import experience
from hydra_rlhf.errors import UserError
from hydra_rlhf.rollout import Sampling, pad_left
from hydra_rlhf.vllm_rollout import VLLMEngine, importance_weights
from tests.rlhf.families import EOS, PAD, make_lm, make_model
from tests.rlhf.test_ppo import plain_model, run, settings

SAMPLING = Sampling(6, 0.7, (EOS, 13), PAD, top_k=20)


@dataclass
class SamplingParams:
    max_tokens: int
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    stop_token_ids: list[int]
    ignore_eos: bool
    logprobs: int
    seed: int
    detokenize: bool


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass
class Completion:
    token_ids: list[int]
    logprobs: list[dict[int, Any]]
    finish_reason: str
    stop_reason: int | None


class LLM:
    """Greedy whatever the temperature; log-probabilities moved by ``off``, a mismatch."""

    made: list = []
    off = 0.0

    def __init__(self, model: str, **settings):
        self.settings = settings
        self.base = transformers.AutoModelForCausalLM.from_pretrained(model)
        self.requests: list[LoRARequest | None] = []
        self.params: list[SamplingParams] = []
        LLM.made.append(self)

    def generate(self, prompts, sampling_params, *, use_tqdm, lora_request=None):
        assert not use_tqdm
        self.requests.append(lora_request)
        self.params = sampling_params
        model = self.base
        if lora_request is not None:
            assert lora_request.lora_int_id not in [r.lora_int_id for r in self.requests[:-1] if r]
            model = peft.PeftModel.from_pretrained(model, lora_request.lora_path)
        outs = [
            self.one(model, torch.tensor([prompt["prompt_token_ids"]]), params)
            for prompt, params in zip(prompts, sampling_params, strict=True)
        ]
        if lora_request is not None:
            self.base = model.unload()
        return [types.SimpleNamespace(outputs=[out]) for out in outs]

    @torch.no_grad()
    def one(self, model, ids, params) -> Completion:
        tokens: list[int] = []
        steps = []
        while len(tokens) < params.max_tokens:
            logits = model(torch.cat([ids, torch.tensor([tokens], dtype=torch.long)], 1)).logits
            scores = torch.log_softmax(logits[0, -1].float() / params.temperature, -1)
            tokens.append(int(scores.argmax()))
            found = types.SimpleNamespace(logprob=float(scores[tokens[-1]]) + self.off)
            steps.append({tokens[-1]: found})
            if tokens[-1] in params.stop_token_ids:
                return Completion(tokens, steps, "stop", tokens[-1])
        return Completion(tokens, steps, "length", None)


@pytest.fixture
def vllm(monkeypatch):
    module, lora = types.ModuleType("vllm"), types.ModuleType("vllm.lora")
    request = types.ModuleType("vllm.lora.request")
    module.LLM, module.SamplingParams, module.lora = LLM, SamplingParams, lora
    lora.request, request.LoRARequest = request, LoRARequest
    for name, part in (("vllm", module), ("vllm.lora", lora), ("vllm.lora.request", request)):
        monkeypatch.setitem(sys.modules, name, part)
    monkeypatch.setattr(LLM, "made", [])
    monkeypatch.setattr(LLM, "off", 0.0)
    return module


@pytest.fixture
def base(tmp_path) -> str:
    make_lm("llama").save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_samples_under_the_adapter_as_it_is_now(vllm, base):
    model = make_model("llama", trained=True)
    ids, mask = pad_left([[5, 6, 7], [8] * 6], PAD)
    sampler = VLLMEngine(base)
    outs = {}
    for role in ("actor", "reference", "actor"):
        outs[role] = sampler(model, ids, mask, SAMPLING, role=role, seeds=[4, 9])
        scored = model.score(
            outs[role].query_responses,
            outs[role].attention_mask,
            outs[role].response_mask,
            roles=(role,),
            temperature=0.7,
        )
        trainers = scored.logprobs if role == "actor" else scored.ref_logprobs
        torch.testing.assert_close(outs[role].logprobs, trainers.detach(), rtol=0, atol=1e-5)
        with torch.no_grad():
            for parameter in model.adapter_parameters("actor"):
                parameter.mul_(1.5)
    assert not torch.equal(outs["actor"].query_responses, outs["reference"].query_responses)
    (llm,) = LLM.made
    assert llm.settings["enable_lora"] and llm.settings["max_lora_rank"] == 4
    assert llm.settings["logprobs_mode"] == "processed_logprobs"
    assert llm.settings["dtype"] == "float32"
    assert [None if r is None else r.lora_int_id for r in llm.requests] == [1, None, 2]
    assert not Path(llm.requests[0].lora_path).exists()  # nothing is left behind
    assert [p.seed for p in llm.params] == [4, 9]
    assert llm.params[0] == SamplingParams(6, 0, 0.7, 20, 1.0, 0.0, [EOS, 13], True, 0, 4, False)


def test_rows_end_where_vllm_says(vllm, base):
    model = make_model("llama", trained=True)
    ids, mask = pad_left([[5, 6, 7], [8] * 6, [3, 4]], PAD)
    free = VLLMEngine(base)(model, ids, mask, SAMPLING)
    stop = int(free.query_responses[0, ids.shape[1] + 2])
    out = VLLMEngine(base)(model, ids, mask, SAMPLING._replace(stop_ids=(stop,)))
    assert out.ended[0] and out.response_mask[0].sum() <= 3
    row = out.query_responses[0, ids.shape[1] :]
    assert row[out.response_mask[0]][-1] == stop and (row[~out.response_mask[0]] == PAD).all()
    assert (out.logprobs[~out.response_mask] == 0).all()
    assert torch.equal(out.attention_mask[:, : ids.shape[1]], mask)


def test_importance_weights_by_hand():
    mask = torch.tensor([[True, True, True, False]])
    new = torch.tensor([[-1.0, -1.0, -1.0, float("nan")]])
    old = torch.tensor([[-1.0, -3.0, -0.5, 0.0]])
    weights = importance_weights(new, old, mask, 2.0)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 2.0, 0.60653066, 1.0]]))


def test_errors_that_say_what_to_do(vllm, base, monkeypatch):
    model = make_model("llama", ())
    ids, mask = pad_left([[5, 6, 7]], PAD)
    with pytest.raises(UserError, match="methods with adapters"):
        VLLMEngine(base)(model, ids, mask, SAMPLING)
    with pytest.raises(UserError, match="sft_model_path"):
        VLLMEngine(None)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match="pip install vllm"):
        VLLMEngine(base)


def hydra_config(base: str, **changes) -> Any:
    changes = {"max_steps": 2, "num_ppo_epochs": 1, "num_mini_batches": 1, **changes}
    return settings(rollout_engine="vllm", sft_model_path=base, **changes)


def test_trains_on_what_vllm_samples(vllm, tmp_path):
    """Where vLLM's log-probabilities are the trainer's, all weights are 1."""
    model = plain_model()
    model.causal_lm.save_pretrained(tmp_path / "sft")
    result = run(hydra_config(str(tmp_path / "sft")), model)
    first, second = result.metrics
    assert first["val/ratio"] == 1.0 and first["val/rollout_logprob_diff"] < 1e-5
    assert second["objective/kl"] != 0.0  # the adapter that was handed over has moved
    assert LLM.made[0].requests[-1].lora_int_id == 2


def test_a_mismatch_weighs_the_policy_loss(vllm, tmp_path, monkeypatch):
    """vLLM's log-probabilities e times too high and too low; 2 is where weights are cut."""
    plain_model().causal_lm.save_pretrained(tmp_path / "sft")
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
