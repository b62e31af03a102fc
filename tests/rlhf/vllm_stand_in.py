"""What vLLM 0.32 does with the calls that are made of it, over transformers' forward pass.

Its classes, arguments and refusals as they were found by running the real one, which is the other
half of test_vllm_rollout.py; where vLLM cannot be imported, this is the only half.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


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

    def __post_init__(self):
        if not 0.0 <= self.temperature <= 2.0:
            raise ValueError(f"temperature must be in [0, 2], got {self.temperature}.")
        if self.temperature > 0.0:
            self.temperature = max(self.temperature, 0.01)


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
    """Log-probabilities are moved by ``off``, a mismatch."""

    made: list[LLM] = []
    off = 0.0
    can_sleep = False

    def __init__(self, model: str, **settings: Any):
        self.settings = settings
        config = transformers.AutoConfig.from_pretrained(model)
        if settings["max_lora_rank"] not in RANKS:
            raise ValueError(
                "1 validation error for LoRAConfig\nmax_lora_rank\n"
                "  Input should be 1, 8, 16, 32, 64, 128, 256, 320 or 512 [type=literal_error]\n"
                "    For further information visit ..."
            )
        if settings["enable_sleep_mode"] and not self.can_sleep:
            raise ValueError("Sleep mode is not supported on current platform.")
        if settings["max_model_len"] > config.max_position_embeddings:
            raise ValueError("User-specified max_model_len is greater than the derived one")
        if (
            settings.get("kv_cache_memory_bytes") is None
            and settings["gpu_memory_utilization"] > 0.5
        ):
            raise ValueError("Free memory on startup is less than desired GPU memory utilization")
        if not settings["skip_tokenizer_init"]:
            transformers.AutoTokenizer.from_pretrained(model)
        if config.model_type == "gpt2":
            raise ValueError("GPT2LMHeadModel does not support LoRA yet.")
        self.base = transformers.AutoModelForCausalLM.from_pretrained(model)
        for file in Path(model).glob("*.safetensors"):
            for name in load_file(file).keys() - self.base.state_dict().keys():
                raise ValueError(f"There is no module or parameter named {name!r}")
        self.requests: list[LoRARequest | None] = []
        self.params: list[SamplingParams] = []
        self.adapters: dict[int, dict[str, Any]] = {}  # by number: what is known is not read again
        self.events: list[str] = []
        core = types.SimpleNamespace(shutdown=lambda: self.events.append("shutdown"))
        self.llm_engine = types.SimpleNamespace(engine_core=core)
        LLM.made.append(self)

    def sleep(self, level: int) -> None:
        assert self.settings["enable_sleep_mode"] and level == 1
        self.events.append("sleep")

    def wake_up(self) -> None:
        self.events.append("wake_up")

    def generate(self, prompts, sampling_params, *, use_tqdm, lora_request=None):
        assert not use_tqdm
        assert self.events[-1:] not in (["sleep"], ["shutdown"])
        self.requests.append(lora_request)
        self.params = sampling_params
        model = self.base
        if lora_request is not None:
            model = self._adapted(lora_request)
        outs = [
            self._one(model, prompt["prompt_token_ids"], params)
            for prompt, params in zip(prompts, sampling_params, strict=True)
        ]
        if lora_request is not None:
            self.base = model.unload()
        return [types.SimpleNamespace(outputs=[out]) for out in outs]

    def _adapted(self, request: LoRARequest) -> Any:
        assert request.lora_int_id > 0 and request.lora_path
        path = Path(request.lora_path)
        if request.lora_int_id not in self.adapters:
            config = peft.LoraConfig.from_pretrained(str(path))
            if config.use_dora:
                raise ValueError("vLLM does not yet support DoRA.")
            assert config.r <= self.settings["max_lora_rank"]
            state = peft.utils.load_peft_weights(str(path), device="cpu")
            self.adapters[request.lora_int_id] = {"config": config, "state": state}
        known = self.adapters[request.lora_int_id]
        model = peft.get_peft_model(self.base, known["config"])
        peft.set_peft_model_state_dict(model, known["state"])
        return model.eval()

    @torch.no_grad()
    def _one(self, model: Any, prompt: list[int], params: SamplingParams) -> Completion:
        room = self.settings["max_model_len"] - len(prompt)
        if room < 1:
            raise ValueError(f"The decoder prompt (length {len(prompt)}) ... is longer")
        draw = torch.Generator().manual_seed(params.seed)
        tokens: list[int] = []
        steps: list[dict[int, Any]] = []
        while len(tokens) < min(params.max_tokens, room):
            logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, -1].float()
            if len(tokens) < params.min_tokens:
                logits[params.stop_token_ids] = -torch.inf
            if params.temperature > 0.0:
                logits = _filtered(logits / params.temperature, params)
            scores = torch.log_softmax(logits, -1)
            likeliest = params.temperature == 0.0
            token = scores.argmax() if likeliest else scores.exp().multinomial(1, generator=draw)
            tokens.append(int(token))
            steps.append(
                {tokens[-1]: types.SimpleNamespace(logprob=float(scores[tokens[-1]]) + self.off)}
            )
            if tokens[-1] in params.stop_token_ids:
                return Completion(tokens, steps, "stop", tokens[-1])
        return Completion(tokens, steps, "length", None)


def _filtered(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """min_p, then top_k, then top_p."""
    if params.min_p > 0.0:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < params.min_p * probs.max(), -torch.inf)
    if params.top_k > 0:
        logits = logits.masked_fill(logits < logits.topk(params.top_k).values[-1], -torch.inf)
    if params.top_p < 1.0:
        ordered, order = logits.softmax(-1).sort(descending=True)
        logits[order[ordered.cumsum(-1) - ordered >= params.top_p]] = -torch.inf
    return logits


def modules() -> dict[str, types.ModuleType]:
    """By the names that they are imported under."""
    vllm, lora = types.ModuleType("vllm"), types.ModuleType("vllm.lora")
    request, platforms = types.ModuleType("vllm.lora.request"), types.ModuleType("vllm.platforms")
    found: dict[str, Any] = {
        "vllm": vllm,
        "vllm.lora": lora,
        "vllm.lora.request": request,
        "vllm.platforms": platforms,
    }
    parts: Any = vllm
    parts.LLM, parts.SamplingParams, parts.__version__ = LLM, SamplingParams, "0.32.0"
    parts.lora, parts.platforms = lora, platforms
    parts = request
    parts.LoRARequest = LoRARequest
    parts = platforms
    parts.current_platform = types.SimpleNamespace(is_sleep_mode_available=lambda: LLM.can_sleep)
    return found
