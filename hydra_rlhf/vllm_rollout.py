"""Sampling by vLLM: the base model from its folder, the trained adapter handed over by path.

vLLM computes with kernels and roundings of its own, so its log-probabilities are not those that the
trainer scores; :func:`importance_weights` corrects for it. Needs ``pip install vllm``; run with
0.32 on a CPU, never on a GPU.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import cached_file

from hydra_rlhf.decode_state import kv_bytes
from hydra_rlhf.errors import UserError, first_line
from hydra_rlhf.model import HydraModel
from hydra_rlhf.pretrained import REWARD_HEAD, VALUE_HEAD
from hydra_rlhf.rollout import Engine, Request, Rollout, Sampling, of_rows, scored_logprobs

_log = logging.getLogger("hydra_rlhf")
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # max_lora_rank is one of these
_BLOCK = 128  # tokens: the largest block of keys and values that vLLM takes unasked
_COLDEST = 0.01  # vLLM raises a lower temperature to this, and says so in its log alone


class VLLMEngine(Engine):
    """Samples by vLLM; in one process, beside which vLLM starts its own.

    Loaded at the first call, and again should prompts or adapters outgrow it: it holds keys and
    values for that call's batch, since vLLM left to itself takes nearly all of the device. Between
    calls it sleeps where vLLM can, which is not on a CPU: its weights wait in the host's memory.

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
            self._platforms = importlib.import_module("vllm.platforms")
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
        self._chosen: dict[str, Any] = {}  # what it was loaded with
        self._asleep = False
        self._links: tempfile.TemporaryDirectory | None = None
        self._handed_over = 0  # adapters so far: vLLM keeps one by its number

    def sample(self, request: Request) -> Rollout:
        """Log-probabilities are vLLM's, as it sampled.

        They always come, for the weights of the mismatch, and are those of the distribution drawn
        from, filters included; under greedy decoding, which has none, they are scored where they
        are asked for. ``keep_prefix`` is not obeyed.

        Raises:
            UserError: the actor has no adapter, so that nothing small can be handed over; the
                temperature, a length, or the model is out of vLLM's reach.
        """
        model, input_ids, attention_mask, sampling, role, with_logprobs, seeds, _ = request
        adapter = model.role(role).adapter
        if adapter is None and role == "actor":
            raise UserError("rollout_engine 'vllm' is for methods with adapters, not for ppo")
        if sampling.do_sample and sampling.temperature < _COLDEST:
            raise UserError(
                f"rollout_engine 'vllm' cannot obey temperature {sampling.temperature}: "
                f"vLLM's lowest is {_COLDEST}; take rollout_engine 'hydra'"
            )
        prompts = [
            {"prompt_token_ids": row[kept].tolist()}
            for row, kept in zip(input_ids, attention_mask.bool(), strict=True)
        ]
        if seeds is None:
            seeds = torch.randint(2**31, (len(prompts),)).tolist()
        longest = max(len(prompt["prompt_token_ids"]) for prompt in prompts)
        with self._told(), tempfile.TemporaryDirectory() as folder:
            params = [self._params(sampling, int(seed)) for seed in seeds]
            self._be_ready(model, len(prompts), longest + sampling.response_length)
            lora = None if adapter is None else self._hand_over(model, adapter, folder)
            try:
                outputs = self._llm.generate(prompts, params, use_tqdm=False, lora_request=lora)
            except Exception:
                self.close()  # the next call would wait for the request that failed
                raise
        completions = [out.outputs[0] for out in outputs]
        rollout = _as_rollout(completions, input_ids, attention_mask, sampling)
        if not sampling.do_sample:
            rollout.foreign = False
            rollout.logprobs = None
            if with_logprobs:
                rollout.logprobs = scored_logprobs(model, rollout, role, sampling.temperature)
        return rollout

    def release(self) -> None:
        if self._llm is not None and self._chosen["enable_sleep_mode"] and not self._asleep:
            self._llm.sleep(level=1)
            self._asleep = True

    @property
    def nbytes(self) -> int:
        if self._llm is None or self._asleep:
            return 0
        return self._chosen["kv_cache_memory_bytes"] or 0  # None: vLLM's to find out

    def close(self) -> None:
        """Ends vLLM and its processes; the next call loads it again."""
        if self._llm is None:
            return
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        self._asleep = False
        gc.collect()

    def _be_ready(self, model: HydraModel, batch: int, longest: int) -> None:
        """Loads vLLM, or wakes it, with room for ``longest`` tokens of prompt and response."""
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        configs = [model.base.peft_config[name] for name in model.adapters]
        rank = max((r for c in configs for r in (c.r, *c.rank_pattern.values())), default=1)
        # Of its own accord vLLM would cut the response, and not say so.
        for name, need, most in (
            ("max_model_len", longest, self._settings.get("max_model_len", limit)),
            ("max_lora_rank", rank, self._settings.get("max_lora_rank", _RANKS[-1])),
        ):
            if most is not None and need > most:
                raise UserError(f"rollout_engine 'vllm': {name} is at most {most}, not {need}")
        loaded = self._chosen if self._llm is not None else None
        if loaded and (longest > loaded["max_model_len"] or rank > loaded["max_lora_rank"]):
            _log.info("vLLM is loaded again, for %d tokens and adapters of rank %d", longest, rank)
            self.close()
        if model.device.type == "cuda":
            torch.cuda.empty_cache()  # vLLM's process has no use for what is kept in this one
        if self._llm is None:
            self._chosen = {**self._choices(model, batch, longest, rank), **self._settings}
            self._llm = self._vllm.LLM(model=self._without_heads(), **self._chosen)
        elif self._asleep:
            self._llm.wake_up()
            self._asleep = False

    def _without_heads(self) -> str:
        """The base, or links to it without heads that lie among the weights, as they once did.

        vLLM would take them for weights of its own.
        """
        folder = Path(self._base)
        if not folder.is_dir():
            folder = Path(str(cached_file(self._base, "config.json"))).parent
        heads = (Path(REWARD_HEAD).name, Path(VALUE_HEAD).name)
        if not any((folder / name).exists() for name in heads):
            return self._base
        self._links = tempfile.TemporaryDirectory()
        for file in folder.iterdir():
            if file.name not in heads:
                (Path(self._links.name) / file.name).symlink_to(file.resolve())
        return self._links.name

    def _choices(self, model: HydraModel, batch: int, longest: int, rank: int) -> dict[str, Any]:
        text = model.config.get_text_config()
        dtype = model.causal_lm.dtype
        length = 2 * longest  # so that it is seldom loaded again
        length = min(length, getattr(text, "max_position_embeddings", None) or length)
        # One block more is vLLM's own, and a part of one is for those that differ in size.
        blocks = max(batch * -(-longest // _BLOCK), -(-length // _BLOCK)) + 2
        return {
            "dtype": str(dtype).removeprefix("torch."),
            "skip_tokenizer_init": True,  # token ids go in and come out
            "max_model_len": length,
            "kv_cache_memory_bytes": blocks * _BLOCK * kv_bytes(text, dtype.itemsize),
            # Must be free at the start, and is without meaning where the above is given.
            "gpu_memory_utilization": 0.01,
            "enable_sleep_mode": self._platforms.current_platform.is_sleep_mode_available(),
            "enable_lora": True,
            "max_lora_rank": next(size for size in _RANKS if size >= rank),
            # Those of the distribution sampled from, after temperature and filters.
            "logprobs_mode": "processed_logprobs",
            "max_logprobs": 1,
        }

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """What vLLM raises, as one line; the process that it starts has more in the log."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            name = f"vLLM {self._vllm.__version__}"
            raise UserError(
                f"rollout_engine 'vllm': {name} cannot sample from {self._base} "
                f"({_reason(error)}); its log may say more. Or take rollout_engine 'hydra'"
            ) from error

    def _hand_over(self, model: HydraModel, adapter: str, folder: str) -> Any:
        """The adapter as it is now, under a number that vLLM has not seen."""
        model.base.peft_config[adapter].base_model_name_or_path = self._base
        model.base.save_pretrained(folder, selected_adapters=[adapter])
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


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    if len(lines) > 2 and "validation error" in lines[0]:  # pydantic's; what is wrong comes after
        return " ".join(lines[1:3]).split(" [type=")[0]
    return first_line(error)


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
