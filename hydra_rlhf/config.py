"""Every setting of a run, one documented field each.

Names and meanings are TRL's (``PPOConfig``, ``ModelConfig``) wherever TRL has the setting, so that
a configuration carries over. transformers' ``HfArgumentParser`` reads these classes from flags,
YAML or JSON. ``help`` ends with where a default comes from:

- [TRL] TRL 1.12 ``trl.experimental.ppo.PPOConfig`` or ``ModelConfig``;
- [PPO] Schulman et al. 2017, arXiv:1707.06347;
- [RLHF] Ziegler et al. 2019, arXiv:1909.08593; Stiennon et al. 2020, arXiv:2009.01325;
- [N+] Huang et al. 2024, arXiv:2403.17031, "The N+ implementation details of RLHF with PPO";
- [Hydra] Santacroce et al. 2023, arXiv:2309.00754;
- [ours] this project.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from hydra_rlhf.errors import UserError

DTYPES = ("auto", "float32", "bfloat16", "float16")
METHODS = ("ppo", "lora-ppo", "d-lora-ppo", "j-hydra-ppo", "hydra-ppo")

# What samples responses; engines.py has them.
ROLLOUT_ENGINES = ("hydra", "transformers", "continuous", "vllm")


def _field(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


def _list_field(help: str) -> Any:
    return field(default=None, metadata={"help": help})


@dataclass
class LoraSettings:
    """The adapters. Names are those of TRL's ``ModelConfig``."""

    lora_r: int = _field(
        128, "Rank of each adapter. The paper's Llama-7b runs use 128. [Hydra, section 4]"
    )
    lora_alpha: float | None = _field(
        None, "Numerator of the scaling lora_alpha / lora_r; None takes lora_r, scaling 1. [ours]"
    )
    lora_dropout: float = _field(
        0.0,
        "Dropout on the adapters' input. PPO scores with dropout off, so it acts in SFT only. "
        "[ours; TRL has 0.05]",
    )
    lora_target_modules: list[str] | None = _list_field(
        "Names of the linear layers to adapt; none given adapts every linear layer of the "
        "decoder's blocks. [Hydra, section 4]"
    )
    lora_layers_to_transform: list[int] | None = _list_field(
        "Indices of the decoder blocks to adapt; none given adapts all of them. [PEFT]"
    )
    lora_last_k: int | None = _field(
        None,
        "Adapt only the last k decoder blocks. The blocks below are then the same for every role "
        "and run once a rollout (share_prefix). [ours]",
    )

    def validate_lora(self) -> None:
        """Raises UserError, naming the field, for a value that cannot work."""
        if self.lora_r < 1:
            raise UserError(f"lora_r must be at least 1, got {self.lora_r}")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise UserError(f"lora_dropout must be in [0, 1), got {self.lora_dropout}")
        if self.lora_last_k is not None and self.lora_last_k < 1:
            raise UserError(f"lora_last_k must be at least 1, got {self.lora_last_k}")
        if self.lora_last_k is not None and self.lora_layers_to_transform is not None:
            raise UserError("lora_last_k and lora_layers_to_transform exclude each other")


@dataclass
class PPOConfig(LoraSettings):
    """One PPO run."""

    # Models and method
    sft_model_path: str = _field(
        "", "Folder or hub name of the SFT (or Hydra-SFT) model the policy starts from. [TRL]"
    )
    reward_model_path: str | None = _field(
        None,
        "Folder of a separate reward model: a Hydra checkpoint, or any sequence classifier. None "
        "takes the reward head beside the SFT model. [TRL]",
    )
    method: str = _field(
        "hydra-ppo",
        "Which models are held and which are trained; README has the table. [Hydra, table 1]",
        choices=METHODS,
    )
    reference_adapter: str | None = _field(
        None,
        "PEFT folder of an SFT adapter that, frozen, is the reference policy and from which the "
        "actor starts; None takes the base model with adapters off. [ours]",
    )
    reward_fn: str | None = _field(
        None,
        "module:function or file.py:function that scores responses instead of the reward head. "
        "Called as f(prompts=..., completions=..., **columns of the data set) with texts, returns "
        "one number each. Of a conversation the column prompt_messages has the messages. This "
        "runs your code. [ours, signature as TRL's reward_funcs]",
    )

    # Length of the run
    max_steps: int = _field(
        -1, "PPO steps (rollouts) to make; -1 derives them from total_episodes. [TRL]"
    )
    total_episodes: int | None = _field(
        None, "Responses to sample in all; None makes one pass over the prompts. [TRL]"
    )
    per_device_train_batch_size: int = _field(
        8, "Sequences in one forward and backward (a microbatch). [TRL]"
    )
    gradient_accumulation_steps: int = _field(
        1, "Microbatches whose gradients are summed before the optimizer steps. [TRL]"
    )
    num_mini_batches: int = _field(1, "Optimizer steps in one pass over a rollout. [TRL; N+ has 1]")
    local_rollout_forward_batch_size: int = _field(
        64, "Sequences in one scoring pass; the rest wait their turn. [TRL]"
    )
    seed: int = _field(0, "Seed of every random number generator. [ours; TRL has 42]")

    # Rollout
    max_prompt_length: int | None = _field(
        None, "Longer prompts are refused; None allows what the context leaves. [ours]"
    )
    response_length: int = _field(53, "Most tokens in a response. [TRL; RLHF has 48-53]")
    rollout_engine: str = _field(
        "hydra",
        "'hydra' samples over fixed buffers with its state on the device (a CUDA graph on a GPU); "
        "'transformers' by transformers' generate, the same tokens under greedy decoding; "
        "'continuous' by its continuous batching over a paged cache (transformers 5.4); 'vllm' by "
        "vLLM from sft_model_path and the adapter, one process, with importance_cap; or "
        "module:factory, yours. [ours]",
        # One more form than the names that are listed, so checked below.
    )
    importance_cap: float = _field(
        2.0,
        "rollout_engine 'vllm': each token's policy loss is weighted by trainer's over sampler's "
        "probability, at most this. [ours]",
    )
    gather_for_generation: bool = _field(
        True,
        "Under FSDP: hold the whole model while responses are sampled. Otherwise each block is "
        "gathered for each token, which takes less memory and far more time. "
        "[TRL, ds3_gather_for_generation]",
    )
    min_response_length: int = _field(
        0,
        "Fewest tokens before a stop token may come. Above 0 the sampler is no longer the policy "
        "that is scored, and a warning says so. [ours]",
    )
    temperature: float = _field(
        0.7,
        "Divides the logits when sampling, and those of actor, reference and update alike. [TRL]",
    )
    top_k: int = _field(0, "Sample from the k likeliest tokens; 0 is off (on-policy). [ours]")
    top_p: float = _field(1.0, "Nucleus sampling; 1 is off (on-policy). [ours]")
    stop_token: str | None = _field(
        "eos",
        "'eos', or the text of one token at which a response ends besides EOS. [TRL]",
    )
    stop_token_id: int | None = _field(None, "The id of that token, in place of stop_token. [TRL]")
    missing_eos_penalty: float | None = _field(
        None, "Taken from the score of a response without a stop token. [TRL]"
    )
    missing_eos_score: float | None = _field(
        None, "Replaces the score of such a response instead. [RLHF has -1]"
    )
    apply_chat_template: bool = _field(
        False,
        "Wrap text prompts in the tokenizer's chat template, as one user turn, and for a sequence "
        "classifier prompt and response in that of its own. Conversational data is wrapped anyway. "
        "[ours]",
    )
    rollout_logprobs: str = _field(
        "recompute",
        "'recompute' scores the actor again after generation; 'reuse' takes generation's own "
        "log-probabilities (one trunk pass fewer; equal to rounding); 'check' recomputes, compares "
        "and fails when they differ by more than rollout_logprobs_tolerance. [ours]",
        choices=("recompute", "reuse", "check"),
    )
    rollout_logprobs_tolerance: float = _field(
        1e-4, "Largest difference that 'check' accepts, in nats. [ours, float32]"
    )

    # Reward
    kl_coef: float = _field(0.05, "Weight of the KL penalty, beta. [TRL; RLHF]")
    kl_estimator: str = _field(
        "k1",
        "KL of a token: k1, k2, k3 (Schulman 2020), or exact over the whole vocabulary. [TRL]",
        choices=("k1", "k2", "k3", "exact"),
    )
    kl_controller: str = _field(
        "fixed",
        "'fixed', or 'adaptive' to hold objective/kl near kl_target. [RLHF, section 2.2]",
        choices=("fixed", "adaptive"),
    )
    kl_target: float = _field(6.0, "Where the adaptive controller holds the KL, in nats. [RLHF]")
    kl_horizon: float = _field(10_000.0, "Episodes over which the adaptive controller acts. [RLHF]")
    use_score_scaling: bool = _field(
        False, "Divide scores by their running standard deviation. [TRL 0.11]"
    )
    use_score_norm: bool = _field(
        False, "Also subtract their running mean; needs use_score_scaling. [TRL 0.11]"
    )
    score_clip: float | None = _field(
        None, "Clip scores to [-score_clip, score_clip], after scaling. [TRL 0.11]"
    )
    whiten_rewards: bool = _field(
        False, "Divide the per-token rewards by their standard deviation. [TRL]"
    )
    whiten_advantages: bool = _field(
        True, "Give the advantages of a rollout mean 0 and variance 1. [TRL, always on there]"
    )

    # Optimisation
    num_ppo_epochs: int = _field(4, "Passes over a rollout. [TRL; PPO; Hydra]")
    gamma: float = _field(1.0, "Discount of a token. [TRL; RLHF]")
    lam: float = _field(0.95, "lambda of GAE. [TRL; PPO]")
    cliprange: float = _field(0.2, "Half-width of the policy's trust region. [PPO, table 3]")
    cliprange_value: float = _field(0.2, "How far a value may move from its old one. [TRL]")
    vf_coef: float = _field(0.1, "Weight of the value loss. [TRL; RLHF]")
    detach_values: bool = _field(
        False,
        "j-hydra-ppo: the value loss trains the value head alone and leaves the joint adapter to "
        "the policy. [ours]",
    )
    ent_coef: float = _field(0.0, "Weight of an entropy bonus. [PPO, eq. 9; off in RLHF]")
    target_kl: float | None = _field(
        None,
        "Stop a rollout's updates when a minibatch's approx_kl passes 1.5 times this. "
        "[Spinning Up; TRL 0.11]",
    )
    learning_rate: float = _field(3e-6, "Of the actor, or of the joint adapter. [TRL]")
    critic_learning_rate: float | None = _field(
        None, "Of the critic adapter and value head; None takes learning_rate. [ours]"
    )
    adam_beta1: float = _field(0.9, "Adam. [TRL]")
    adam_beta2: float = _field(0.999, "Adam. [TRL]")
    adam_epsilon: float = _field(1e-5, "Adam. [N+, detail 'Adam epsilon 1e-5'; TRL has 1e-8]")
    weight_decay: float = _field(0.0, "Decoupled. [TRL]")
    max_grad_norm: float | None = _field(
        1.0, "Gradients of actor and of critic are each clipped to this norm; None is off. [TRL]"
    )
    lr_scheduler_type: str = _field(
        "linear",
        "After warm-up: linear to 0, cosine to 0, or constant. [N+ anneals linearly]",
        choices=("linear", "cosine", "constant"),
    )
    warmup_steps: int = _field(0, "Optimizer steps over which learning rates rise from 0. [TRL]")
    critic_warmup_steps: int = _field(
        0, "PPO steps at the start in which only the value function learns. [ours]"
    )

    # Memory and reuse
    reuse_reference_reward: bool = _field(
        True, "One adapter-off pass serves reference and reward. [Hydra, section 3]"
    )
    batched_score: str = _field(
        "auto",
        "Score actor, critic and adapter-off rows as one batch: yes, no, or auto, which does it "
        "while the activations of that batch fit batched_score_budget_gb. [ours]",
        choices=("auto", "yes", "no"),
    )
    batched_score_budget_gb: float = _field(
        1.0, "See batched_score, in GB (1e9 bytes): what the widest part of a block holds. [ours]"
    )
    keep_scoring_pass: bool = _field(
        True,
        "Where a rollout is one minibatch of one microbatch, the critic's scoring pass (with a "
        "joint adapter the actor's too) is kept with its gradients, and the first epoch makes no "
        "forward pass of its own. Off where weights are split. [ours]",
    )
    share_prefix: bool = _field(
        True,
        "Run the blocks below the first adapted one once a rollout, for all roles, epochs and "
        "minibatches. [ours]",
    )
    prefix_source: str = _field(
        "scoring",
        "Where those activations come from: scoring, whose pass makes the same bits as without "
        "share_prefix; or rollout, which keeps the actor's while it samples (rollout_engine "
        "'hydra') and differs from that by the dtype's rounding. [ours]",
        choices=("scoring", "rollout"),
    )
    prefix_device: str = _field(
        "auto",
        "Where those activations wait: device, cpu (pinned), or auto, which takes the device "
        "while they fit prefix_budget_gb. [ours]",
        choices=("auto", "device", "cpu"),
    )
    prefix_budget_gb: float = _field(4.0, "See prefix_device, in GB (1e9 bytes). [ours]")
    gradient_checkpointing: bool = _field(
        False, "Recompute each block in backward instead of keeping its activations. [TRL]"
    )
    use_reentrant: bool = _field(
        False, "Which of torch's two checkpoints gradient_checkpointing uses. [TRL]"
    )
    dtype: str | None = _field(
        None,
        "Of the frozen weights: float32, bfloat16 or float16; None takes the checkpoint's. [TRL]",
    )
    mixed_precision: str = _field(
        "no",
        "accelerate's autocast: no, bf16 or fp16. [accelerate]",
        choices=("no", "bf16", "fp16"),
    )

    # Faults and checkpoints
    save_steps: int = _field(0, "Take a checkpoint every so many steps; 0 only when stopped. [TRL]")
    save_total_limit: int | None = _field(None, "Keep only the newest checkpoints. [TRL]")
    max_bad_updates: int = _field(
        5,
        "Updates in a row with a loss or gradient that is not finite before the run ends; those "
        "before it are skipped and counted in policy/bad_updates. [ours]",
    )

    # Records
    sample_steps: int = _field(
        20, "Keep responses of every so many steps, the first and the last; 0 keeps none. [ours]"
    )
    num_samples: int = _field(4, "How many of a step's responses. [ours]")

    # Evaluation
    eval_steps: int = _field(
        0, "Evaluate on held-out prompts every so many steps; 0 never does. [TRL]"
    )
    num_eval_prompts: int = _field(64, "How many of the held-out prompts. [ours]")

    @property
    def local_mini_batch_size(self) -> int:
        """Sequences behind one optimizer step, in one process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def local_batch_size(self) -> int:
        """Sequences in one rollout, in one process."""
        return self.local_mini_batch_size * self.num_mini_batches

    def num_steps(self, num_prompts: int, processes: int = 1) -> int:
        """PPO steps of the run: max_steps, or enough for total_episodes, or one pass."""
        if self.max_steps > 0:
            return self.max_steps
        episodes = self.total_episodes or num_prompts
        return math.ceil(episodes / (self.local_batch_size * processes))

    def validate(self) -> None:
        """Raises UserError, naming the field, for a value that cannot work."""
        self.validate_lora()
        for f in dataclasses.fields(self):
            choices = f.metadata.get("choices")
            value = getattr(self, f.name)
            if choices and value not in choices:
                raise UserError(f"{f.name} must be one of {', '.join(choices)}; got {value!r}")
        if self.dtype not in (None, *DTYPES):
            raise UserError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")
        for name in (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "num_mini_batches",
            "local_rollout_forward_batch_size",
            "response_length",
            "num_ppo_epochs",
            "max_bad_updates",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("temperature", "learning_rate", "adam_epsilon", "cliprange_value"):
            if not getattr(self, name) > 0.0:
                raise UserError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("gamma", "lam"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UserError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in (
            "kl_coef",
            "vf_coef",
            "weight_decay",
            "critic_warmup_steps",
            "warmup_steps",
            "top_k",
            "min_response_length",
        ):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.detach_values and self.method != "j-hydra-ppo":
            raise UserError(
                f"detach_values is for j-hydra-ppo: the critic of {self.method} has weights of its "
                "own, which the value loss trains"
            )
        if not 0.0 < self.cliprange < 1.0:
            raise UserError(f"cliprange must be in (0, 1), got {self.cliprange}")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.min_response_length > self.response_length:
            raise UserError(
                f"min_response_length {self.min_response_length} is above "
                f"response_length {self.response_length}"
            )
        if self.use_score_norm and not self.use_score_scaling:
            raise UserError("use_score_norm needs use_score_scaling")
        if self.missing_eos_penalty is not None and self.missing_eos_score is not None:
            raise UserError("missing_eos_penalty and missing_eos_score exclude each other")
        if self.rollout_engine not in ROLLOUT_ENGINES and ":" not in self.rollout_engine:
            raise UserError(
                f"rollout_engine must be one of {', '.join(ROLLOUT_ENGINES)}, or module:factory; "
                f"got {self.rollout_engine!r}"
            )
        if self.rollout_engine == "continuous" and self.min_response_length > 0:
            raise UserError("rollout_engine 'continuous' has no min_response_length")
        if not self.importance_cap > 0.0:
            raise UserError(f"importance_cap must be above 0, got {self.importance_cap}")
        if self.rollout_engine == "vllm" and self.rollout_logprobs != "recompute":
            raise UserError(
                "rollout_engine 'vllm' needs rollout_logprobs 'recompute': its own "
                "log-probabilities are not the trainer's"
            )
        if self.rollout_engine == "vllm" and self.method == "ppo":
            raise UserError("rollout_engine 'vllm' is for methods with adapters, not for ppo")
        if self.rollout_logprobs == "reuse" and self.off_policy_reasons():
            raise UserError(
                "rollout_logprobs='reuse' needs a sampler that is the policy: "
                + "; ".join(self.off_policy_reasons())
            )

    def off_policy_reasons(self) -> list[str]:
        """Why the sampler is not the distribution that is scored; empty when it is."""
        reasons = []
        if self.top_k > 0:
            reasons.append(f"top_k is {self.top_k}, not 0")
        if self.top_p < 1.0:
            reasons.append(f"top_p is {self.top_p}, not 1")
        if self.min_response_length > 0:
            reasons.append(f"min_response_length is {self.min_response_length}, not 0")
        return reasons
