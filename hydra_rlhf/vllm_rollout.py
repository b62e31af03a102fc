"""Sampling by vLLM: the base model from its folder, the trained adapter handed over by path.

vLLM computes with kernels and roundings of its own, so its log-probabilities are not those that the
trainer scores; :func:`importance_weights` corrects for it. Needs ``pip install vllm``; tested here
against a stand-in with vLLM's interface only.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hydra_rlhf.errors import UserError
from hydra_rlhf.model import HydraModel
from hydra_rlhf.rollout import Engine, Request, Rollout, Sampling, of_rows


class VLLMEngine(Engine):
    """Samples by vLLM; in one process.

    Args:
        base: Folder or hub name of the model that the adapters were put on.
        settings: More for ``vllm.LLM``, in place of what is chosen here.

    Raises:
        UserError: vLLM is not installed, or there is no folder for it to read.
    """

    def __init__(self, base: str | None, **settings: Any):
        try:
            self._vllm = importlib.import_module("vllm")
            self._lora = importlib.import_module("vllm.lora.request")
        except ImportError as error:
            raise UserError(
                f"rollout_engine 'vllm' needs vLLM, which cannot be imported ({error}): "
                "pip install vllm, or take rollout_engine 'hydra'"
            ) from error
        if base is None:
            raise UserError("rollout_engine 'vllm' reads the model from sft_model_path: give one")
        self._base = base
        self._settings = settings
        self._llm: Any = None
        self._handed_over = 0  # adapters so far: vLLM keeps one by its number

    def sample(self, request: Request) -> Rollout:
        """Log-probabilities are vLLM's, as it sampled.

        They always come, for the weights of the mismatch; ``keep_prefix`` is not obeyed.

        Raises:
            UserError: the model has no adapters, so that nothing small can be handed over.
        """
        model, input_ids, attention_mask, sampling, role, _, seeds, _ = request
        if not model.adapters:
            raise UserError("rollout_engine 'vllm' is for methods with adapters, not for ppo")
        if self._llm is None:
            self._llm = self._load(model)
        prompts = [
            {"prompt_token_ids": row[kept].tolist()}
            for row, kept in zip(input_ids, attention_mask.bool(), strict=True)
        ]
        if seeds is None:
            seeds = torch.randint(2**31, (len(prompts),)).tolist()
        params = [self._params(sampling, int(seed)) for seed in seeds]
        adapter = model.role(role).adapter
        if adapter is None:
            outputs = self._llm.generate(prompts, params, use_tqdm=False)
        else:
            with tempfile.TemporaryDirectory() as folder:
                lora = self._hand_over(model, adapter, folder)
                outputs = self._llm.generate(prompts, params, use_tqdm=False, lora_request=lora)
        return _as_rollout([out.outputs[0] for out in outputs], input_ids, attention_mask, sampling)

    def _load(self, model: HydraModel) -> Any:
        config = model.base.peft_config[model.adapters[0]]
        settings = {
            "dtype": str(model.causal_lm.dtype).removeprefix("torch."),
            "enable_lora": True,
            "max_lora_rank": config.r,
            # Those of the distribution sampled from, after temperature and filters.
            "logprobs_mode": "processed_logprobs",
            "max_logprobs": 1,
            **self._settings,
        }
        return self._vllm.LLM(model=self._base, **settings)

    def _hand_over(self, model: HydraModel, adapter: str, folder: str) -> Any:
        model.save_adapters(folder, base_model=self._base)
        self._handed_over += 1
        return self._lora.LoRARequest(
            f"{adapter}-{self._handed_over}", self._handed_over, str(Path(folder) / adapter)
        )

    def _params(self, sampling: Sampling, seed: int) -> Any:
        return self._vllm.SamplingParams(
            max_tokens=sampling.response_length,
            min_tokens=sampling.min_response_length,
            temperature=sampling.temperature if sampling.do_sample else 0.0,
            top_k=sampling.top_k if sampling.top_k > 0 else -1,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            stop_token_ids=list(sampling.stop_ids),
            ignore_eos=True,  # stop_token_ids has it where it counts
            logprobs=0,  # of the token that was drawn, and of no other
            seed=seed,
            detokenize=False,
        )


def importance_weights(
    logprobs: Tensor,  # (B, T) the trainer's
    sampled_logprobs: Tensor,  # (B, T) the sampler's
    mask: Tensor,  # (B, T) bool
    cap: float,
) -> Tensor:
    """``min(exp(logprobs - sampled_logprobs), cap)`` of each token, 1 where masked.

    Times the policy's loss it is truncated importance sampling: in expectation what the trainer's
    own policy would have sampled, but for the tokens that are cut at ``cap`` (Ionides 2008,
    "Truncated Importance Sampling", eq. 3, a token at a time).
    """
    gap = torch.where(mask, logprobs - sampled_logprobs, 0.0)
    return gap.exp().clamp(max=cap)


def _as_rollout(
    completions: Sequence[Any], input_ids: Tensor, attention_mask: Tensor, sampling: Sampling
) -> Rollout:
    rows: list[list[int]] = []
    scores: list[list[float]] = []
    ended = []
    for completion in completions:
        tokens = list(completion.token_ids)
        stopped = completion.finish_reason == "stop"
        if stopped and tokens[-1] not in sampling.stop_ids:
            raise RuntimeError(f"vLLM stopped at {completion.stop_reason} and left it out")
        rows.append(tokens)
        scores.append(
            [steps[token].logprob for steps, token in zip(completion.logprobs, tokens, strict=True)]
        )
        ended.append(stopped)
    rollout = of_rows(rows, scores, ended, input_ids, attention_mask, sampling)
    rollout.foreign = True
    return rollout
