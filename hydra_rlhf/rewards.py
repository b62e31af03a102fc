"""Where scores come from besides the reward head, and what is done to them before PPO."""

from __future__ import annotations

import importlib
import inspect
import logging
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hydra_rlhf import hub
from hydra_rlhf.errors import UserError

_log = logging.getLogger("hydra_rlhf")

# f(prompts=..., completions=..., **columns) -> one number each, as TRL's reward functions.
RewardFn = Callable[..., Sequence[float]]


def load_reward_fn(spec: str) -> RewardFn:
    """The function behind ``module:function`` or ``file.py:function``. This runs the user's code.

    Modules are looked for in the working directory first; a file finds those that lie beside it.

    Raises:
        UserError: the form is wrong, or there is no such module, file or function.
    """
    return load_named(spec, "reward_fn")


def load_named(spec: str, setting: str) -> Callable[..., Any]:
    """As :func:`load_reward_fn`, for any setting of this form."""
    module_name, _, name = spec.rpartition(":")
    is_file = module_name.endswith(".py")
    if not module_name or not name or (not is_file and ("/" in spec or spec.startswith("."))):
        raise UserError(f"{setting} must be module:function or file.py:function, got {spec!r}")
    if is_file and not Path(module_name).is_file():
        raise UserError(f"{setting}: there is no file {module_name}")
    beside = str(Path(module_name).resolve().parent if is_file else Path.cwd())
    if beside not in sys.path:
        sys.path.insert(0, beside)
    try:
        module = importlib.import_module(Path(module_name).stem if is_file else module_name)
    except ImportError as e:
        raise UserError(f"{setting}: cannot import {module_name}: {e}") from e
    if is_file and Path(getattr(module, "__file__", None) or "").resolve() != (
        Path(module_name).resolve()
    ):
        raise UserError(
            f"{setting}: {module_name} has the name of a module that is already there; rename it"
        )
    fn = getattr(module, name, None)
    if not callable(fn):
        raise UserError(f"{setting}: {module_name} has no function {name}")
    return fn


def call_reward_fn(
    fn: RewardFn,
    prompts: list[str],
    completions: list[str],
    columns: dict[str, list[Any]],
    device: torch.device,
) -> Tensor:
    """(B,) float32 scores from a user's function, checked.

    Columns are passed to a function that takes ``**kwargs``, and else those that it names.

    Raises:
        UserError: it raised, gave another number of scores, or one that is not finite.
    """
    name = getattr(fn, "__name__", type(fn).__name__)
    parameters = inspect.signature(fn).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        columns = {k: v for k, v in columns.items() if k in parameters}
    try:
        # A model in it has a precision of its own, whatever the policy's passes run in.
        with torch.autocast(device.type, enabled=False):
            answer = fn(prompts=prompts, completions=completions, **columns)
            if isinstance(answer, Iterator):  # whose code has yet to run
                answer = list(answer)
    except Exception as e:
        raise UserError(
            f"reward function {name} raised {type(e).__name__}: {e}{_line(fn, e)}"
            f"{_first(prompts, completions)}"
        ) from e
    try:
        scores = [float(score) for score in answer]
    except (TypeError, ValueError, RuntimeError) as e:
        raise UserError(
            f"reward function {name} gave {answer!r:.80}, not a list of one number a response ({e})"
        ) from e
    if len(scores) != len(completions):
        raise UserError(
            f"reward function {name} gave {len(scores)} scores for {len(completions)} responses"
            f"{_first(prompts, completions)}"
        )
    for prompt, completion, score in zip(prompts, completions, scores, strict=True):
        if not math.isfinite(score):
            raise UserError(
                f"reward function {name} gave {score} for {completion!r:.80} after {prompt!r:.80}"
            )
    return torch.tensor(scores, dtype=torch.float32, device=device)


def _line(fn: RewardFn, error: Exception) -> str:
    """The last line of the function's own file that was running; for a wrong call, its form."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # but the call
    if not frames:
        return "; it is called with the lists prompts= and completions=, and other columns by name"
    own = getattr(inspect.unwrap(fn), "__code__", None)
    inside = [frame for frame in frames if own and frame.filename == own.co_filename]
    last = (inside or frames)[-1]
    return f" in {Path(last.filename).name}, line {last.lineno}"


def _first(prompts: list[str], completions: list[str]) -> str:
    """Which batch it was: the function alone knows at which of its samples it stopped."""
    if not completions:
        return ""
    return f" (of its samples the first is {completions[0]!r:.80} after {prompts[0]!r:.80})"


class ClassifierReward:
    """A Hugging Face sequence classifier as a reward function, with a tokenizer of its own.

    The score is the first logit of a one-label head, and the log-odds of the last label against
    the first of a two-label one. Prompt and response are joined as text; where the data has the
    prompt's messages (column ``prompt_messages``) or ``apply_chat_template`` asks for it, they are
    turns of this tokenizer's own chat template. What is longer than the model's context loses its
    beginning, and a warning says so once.

    Args:
        path: Folder or hub name for ``AutoModelForSequenceClassification``.
        device: Where to.
        batch_size: Texts in one pass.
        tokenizer: In place of the one that lies beside the model.
        apply_chat_template: Take a text prompt as one user turn; needs a template.

    Raises:
        UserError: it cannot be loaded.
    """

    __name__ = "classifier"

    def __init__(
        self,
        path: str | Path,
        *,
        device: torch.device | str = "cpu",
        batch_size: int = 16,
        tokenizer: Any = None,
        apply_chat_template: bool = False,
    ):
        with hub.loading("a reward model", path, SafetensorError):
            self.tokenizer = tokenizer or AutoTokenizer.from_pretrained(
                str(path), trust_remote_code=False
            )
            self.model = AutoModelForSequenceClassification.from_pretrained(
                str(path), dtype="auto", trust_remote_code=False
            )
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        pad, config = self.tokenizer.pad_token_id, self.model.config
        if config.pad_token_id is None and pad != self.tokenizer.eos_token_id:
            config.pad_token_id = pad
        self.model.eval().requires_grad_(False).to(device)
        # The classifier finds a row's last token by its own id, and without one takes the last
        # column: else texts are alone, unpadded, and one that ends in EOS is judged there.
        self.batch_size = batch_size if config.pad_token_id == pad else 1
        self.has_template = bool(getattr(self.tokenizer, "chat_template", None))
        if apply_chat_template and not self.has_template:
            raise UserError(f"apply_chat_template: the tokenizer of {path} has no chat template")
        self.apply_chat_template = apply_chat_template
        # The classifier gives no positions: padding on the left would shift them.
        self.tokenizer.padding_side = "right"
        # The end of a response is what is judged.
        self.tokenizer.truncation_side = "left"
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.max_length = min(context or 10**9, self.tokenizer.model_max_length)
        self._said = False

    @torch.no_grad()
    def __call__(self, prompts: list[str], completions: list[str], **columns) -> list[float]:
        messages = columns.get("prompt_messages") or [None] * len(prompts)
        encoded = [self._encode(*row) for row in zip(prompts, completions, messages, strict=True)]
        scores: list[float] = []
        for start in range(0, len(encoded), self.batch_size):
            batch = self.tokenizer.pad(
                {"input_ids": encoded[start : start + self.batch_size]}, return_tensors="pt"
            ).to(self.model.device)
            logits = self.model(**batch).logits.float()
            score = logits[:, 0] if logits.shape[1] == 1 else logits[:, -1] - logits[:, 0]
            scores += score.tolist()
        return scores

    def _encode(self, prompt: str, completion: str, messages: list[dict] | None) -> list[int]:
        text, special = prompt + completion, True
        if self.has_template and (messages or self.apply_chat_template):
            messages = messages or [{"role": "user", "content": prompt}]
            answer = {"role": "assistant", "content": completion}
            text = self.tokenizer.apply_chat_template([*messages, answer], tokenize=False)
            special = False  # the template wrote them out
        ids = self.tokenizer.encode(text, add_special_tokens=special)
        if len(ids) <= self.max_length:
            return ids
        if not self._said:
            self._said = True
            _log.warning(
                "the reward model's context is %d tokens and a text has %d: it loses its beginning",
                self.max_length,
                len(ids),
            )
        return self.tokenizer.encode(
            text, add_special_tokens=special, truncation=True, max_length=self.max_length
        )


class RunningMoments:
    """Mean and variance of all scores seen so far (Chan et al. 1979, the pairwise update)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self.m2 = 0.0  # sum of squared distances from the mean

    @property
    def std(self) -> float:
        return math.sqrt(self.m2 / max(self.count - 1, 1))

    def update(self, scores: Tensor) -> None:
        n = scores.numel()
        if n == 0:
            return
        values = scores.double()
        mean = float(values.mean())
        delta = mean - self.mean
        total = self.count + n
        self.m2 += float(((values - mean) ** 2).sum()) + delta**2 * self.count * n / total
        self.mean += delta * n / total
        self.count = total


def shape_scores(
    scores: Tensor,
    ended: Tensor,
    *,
    missing_eos_penalty: float | None = None,
    missing_eos_score: float | None = None,
    moments: RunningMoments | None = None,
    center: bool = False,
    clip: float | None = None,
    gather: Callable[[Tensor], Tensor] = lambda scores: scores,
) -> Tensor:
    """Scores as PPO sees them: missing-EOS rule, scaling by running moments, clipping, in order.

    Args:
        scores: (B,) raw.
        ended: (B,) bool, False where the response ran out of length.
        missing_eos_penalty: Taken from those.
        missing_eos_score: Or put in their place.
        moments: Divide by its standard deviation, after adding this batch to it, once there is one.
        center: Also subtract its mean.
        clip: Largest magnitude.
        gather: Scores of every process, for the moments.

    Returns:
        (B,).
    """
    if missing_eos_penalty is not None:
        scores = torch.where(ended, scores, scores - missing_eos_penalty)
    if missing_eos_score is not None:
        scores = torch.where(ended, scores, missing_eos_score)
    if moments is not None:
        moments.update(gather(scores))
        mean = moments.mean if center else 0.0
        # Scores that were all alike so far have no scale: a failing check's -1 would be -1e8.
        alike = moments.std <= 1e-6 * abs(moments.mean)
        scores = (scores - mean) / (1.0 if alike else moments.std)
    return scores if clip is None else scores.clamp(-clip, clip)


class FixedKLController:
    """The KL coefficient as configured."""

    def __init__(self, kl_coef: float):
        self.value = kl_coef

    def update(self, kl: float, episodes: int) -> None:
        """Nothing to do."""


class AdaptiveKLController:
    """Moves the coefficient so that the KL stays near a target.

    ``beta <- beta * (1 + clip(KL / target - 1, -0.2, 0.2) * episodes / horizon)``:
    Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """

    def __init__(self, kl_coef: float, target: float, horizon: float):
        self.value = kl_coef
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, episodes: int) -> None:
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.value *= 1.0 + error * episodes / self.horizon
