"""The five methods: which models are held, and which of them plays which role.

| method | models | actor | critic | reference | reward |
| --- | --- | --- | --- | --- | --- |
| ppo | 4 | trained in full | trained in full | frozen | frozen |
| lora-ppo | 4 | adapter | adapter | frozen | frozen |
| d-lora-ppo | 2 | SFT + adapter | RM + adapter | SFT, adapter off | RM, adapter off |
| j-hydra-ppo | 1 | joint adapter | joint adapter | adapter off | adapter off |
| hydra-ppo | 1 | actor adapter | critic adapter | adapter off | adapter off |

Source: Santacroce et al. 2023, arXiv:2309.00754, table 1 and section 3.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from hydra_kernels.nn import LMHead
from hydra_rlhf import hub
from hydra_rlhf.config import METHODS, LoraSettings, PPOConfig
from hydra_rlhf.errors import UserError
from hydra_rlhf.model import ROLES, HydraModel, Score, default_lora_config
from hydra_rlhf.pretrained import REWARD_HEAD
from hydra_rlhf.rewards import ClassifierReward, RewardFn, load_reward_fn
from hydra_rlhf.roles import check_roles
from hydra_rlhf.trunk import Prefix, blocks, flops, live_width, trunk_of

# Prefixes of the distinct models, keyed by their position in MethodModels.distinct.
Prefixes = Mapping[int, Prefix]


@dataclass
class MethodModels:
    """The models of a method, by role. The same object may play several roles.

    Args:
        method: One of ``config.METHODS``.
        actor, critic, reference, reward: The model of each role. ``reward`` may be None where
            rewards come from a function or from another kind of model.
    """

    method: str
    actor: HydraModel
    critic: HydraModel
    reference: HydraModel
    reward: HydraModel | None

    def by_role(self) -> dict[str, HydraModel]:
        """role -> model, without the roles that nobody plays."""
        every = {role: getattr(self, role) for role in ROLES}
        return {role: model for role, model in every.items() if model is not None}

    @property
    def distinct(self) -> list[HydraModel]:
        """Each model once, the actor's first."""
        return list(dict.fromkeys(self.by_role().values()))

    @property
    def joint(self) -> bool:
        """Whether one adapter set is actor and critic at once."""
        return self.actor is self.critic and "joint" in self.actor.adapters

    def __iter__(self) -> Iterator[HydraModel]:
        return iter(self.distinct)

    def num_passes(self, roles: Sequence[str] = ROLES, *, reuse: bool = True) -> int:
        """Trunk passes to score a rollout: 4, 4, 4, 2 and 3 for the methods in order."""
        played = self.by_role()
        return sum(
            model.num_passes([r for r in roles if played.get(r) is model], reuse=reuse)
            for model in self.distinct
        )

    def batched_bytes(
        self, roles: Sequence[str], rows: int, length: int, *, reuse: bool = True
    ) -> int:
        """Activations that the largest batch of ``score(batched=True)`` holds at its widest."""
        played = self.by_role()
        return max(
            model.num_passes([r for r in roles if played.get(r) is model], reuse=reuse)
            * rows
            * length
            * live_width(model.trunk)
            * model.trunk.dtype.itemsize
            for model in self.distinct
        )

    def compute_prefixes(
        self, input_ids: Tensor, attention_mask: Tensor, *, known: Iterable[int] = ()
    ) -> dict[int, Prefix]:
        """The shared prefix of every model that has one; see :meth:`HydraModel.compute_prefix`.

        Not of those whose position in ``distinct`` is in ``known``.
        """
        computed = {
            i: model.compute_prefix(input_ids, attention_mask)
            for i, model in enumerate(self.distinct)
            if i not in known
        }
        return {i: prefix for i, prefix in computed.items() if prefix is not None}

    def prefix_savings(
        self,
        prefixes: Prefixes,
        roles: Sequence[str],
        *,
        updates: float,
        updated: Sequence[str] = ("actor", "critic"),
        kept: Sequence[str] = (),
        reuse: bool = True,
        free: Iterable[int] = (),
    ) -> dict[str, float]:
        """What the shared prefixes of a rollout saved, in passes through the blocks below them.

        Args:
            prefixes: Of this rollout.
            roles: That were scored.
            updates: Passes over the rollout that the update made, its epochs.
            updated: Roles that it ran.
            kept: Roles whose pass in scoring was also their first one of the update.
            reuse: Whether reference and reward shared a pass anyway.
            free: Positions in ``distinct`` of the models whose prefix the rollout left behind.

        Returns:
            ``reuse/prefix_flops_saved``, counted by ``trunk.flops``, forward passes only;
            ``reuse/prefix_bytes_saved``, weights of those blocks that were not read again;
            ``reuse/prefix_bytes_held``, what it cost: the activations kept.
        """
        played = self.by_role()
        saved = {"flops": 0.0, "bytes": 0.0, "held": 0.0}
        for i, model in enumerate(self.distinct):
            prefix = prefixes.get(i)
            if prefix is None:
                continue
            scoring = model.num_passes([r for r in roles if played.get(r) is model], reuse=reuse)
            updating = model.num_passes([r for r in updated if played.get(r) is model])
            twice = model.num_passes([r for r in kept if played.get(r) is model])
            computed = i not in free  # where scoring did
            avoided = scoring + updates * updating - twice - computed
            batch, length = prefix.hidden.shape[:2]
            below = blocks(model.trunk)[: prefix.layer]
            saved["flops"] += avoided * flops(model.trunk, 0, prefix.layer, batch, length)
            saved["bytes"] += avoided * sum(
                p.numel() * p.element_size() for block in below for p in block.parameters()
            )
            saved["held"] += prefix.nbytes
        return {
            "reuse/prefix_flops_saved": saved["flops"],
            "reuse/prefix_bytes_saved": saved["bytes"],
            "reuse/prefix_bytes_held": saved["held"],
        }

    def score(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        response_mask: Tensor,
        *,
        roles: Sequence[str] = ROLES,
        temperature: float = 1.0,
        kl: bool = False,
        prefixes: Prefixes | None = None,
        **kwargs,
    ) -> Score:
        """:meth:`HydraModel.score` over all the models: each does the roles it plays.

        The exact KL of two whole models is taken from both heads, some rows of logits at a time,
        and is a constant to autograd there.

        Raises:
            ValueError: as there, or no model plays one of the roles.
        """
        played = self.by_role()
        check_roles(roles, kl=kl)
        if missing := [role for role in roles if role not in played]:
            raise ValueError(f"score: {self.method} holds no model for the role {missing[0]}")
        out = Score()
        states: dict[str, Tensor] = {}
        for i, model in enumerate(self.distinct):
            mine = [role for role in roles if played.get(role) is model]
            if not mine:
                continue
            part = model.score(
                input_ids,
                attention_mask,
                response_mask,
                roles=mine,
                temperature=temperature,
                kl=kl and self.actor is self.reference and "actor" in mine,
                prefix=(prefixes or {}).get(i),
                keep_states=states if kl else None,
                **kwargs,
            )
            found = {k: v for k, v in part._asdict().items() if v is not None}
            out = out._replace(**found)
        if kl and self.actor is not self.reference:
            heads = self.actor.lm_head, self.reference.lm_head
            hidden = states["actor"], states["reference"]
            out = out._replace(kl=_kl_of_two_heads(heads, hidden, response_mask, temperature))
        return out

    # Training

    def actor_parameters(self) -> list[nn.Parameter]:
        """What the policy loss trains."""
        return _trained(self.actor, "actor")

    def critic_parameters(self) -> list[nn.Parameter]:
        """What only the value loss trains: the critic's set, less a joint one, and its head."""
        own = [] if self.joint else _trained(self.critic, "critic")
        return [*own, *self.critic.value_head.parameters()]

    # Files

    def save(self, path: str | Path, *, base_model: str | None = None) -> None:
        """Writes what was trained: adapters as PEFT folders, heads, or whole models for ``ppo``.

        ``path/actor``, ``path/critic`` or ``path/joint``; both heads in ``path/heads``.
        """
        path = Path(path)
        if not self.actor.adapters:
            self.actor.save_pretrained(path / "actor")
            self.critic.save_pretrained(path / "critic")
        for model in dict.fromkeys((self.actor, self.critic)):
            if model.adapters:
                model.save_adapters(path, base_model=base_model)
        # Last, because with separate models the actor's own value head is not the one trained.
        self.critic.save_heads(path)


def build_method(
    method: str,
    sft_path: str | Path,
    reward_path: str | Path | None = None,
    *,
    lora: LoraSettings | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    reference_adapter: str | None = None,
    score_with_model: bool = True,
) -> MethodModels:
    """Loads or copies the models of a method.

    Args:
        method: One of ``config.METHODS``.
        sft_path: The SFT or Hydra-SFT model.
        reward_path: A separate reward model with a reward head, for the first three methods;
            None takes the one model for both.
        lora: Rank, targets and layers of the adapters; None takes the defaults.
        dtype: Of the decoders; None takes the checkpoint's.
        device: Where to.
        reference_adapter: Folder of a frozen SFT adapter; the methods on one SFT model only.
        score_with_model: False when rewards come from elsewhere: no reward model is held.

    Raises:
        UserError: the method, the models or their combination cannot work.
    """
    if method not in METHODS:
        raise UserError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if method in ("j-hydra-ppo", "hydra-ppo") and reward_path is not None:
        raise UserError(
            f"{method} takes the reward head of the Hydra-SFT model; a separate reward model is "
            "for ppo, lora-ppo and d-lora-ppo, or train one with --objective hydra"
        )
    if reference_adapter is not None and method in ("ppo", "lora-ppo"):
        raise UserError(f"{method} holds its reference as a model; merge the adapter into it")

    def load(path, frozen=False) -> HydraModel:
        model = HydraModel.from_pretrained(path, dtype=dtype, device=device)
        if frozen:
            model.requires_grad_(False)
        return model

    def adapted(path, adapters, reference=None) -> HydraModel:
        plain = HydraModel.from_pretrained(path, dtype=dtype, device=device)
        return with_adapters(plain, adapters, lora, reference_adapter=reference)

    rm_path = reward_path or sft_path
    if method == "ppo":
        models = MethodModels(
            method,
            actor=load(sft_path),
            critic=load(rm_path),
            reference=load(sft_path, frozen=True),
            reward=load(rm_path, frozen=True) if score_with_model else None,
        )
    elif method == "lora-ppo":
        models = MethodModels(
            method,
            actor=adapted(sft_path, ("actor",)),
            critic=adapted(rm_path, ("critic",)),
            reference=load(sft_path, frozen=True),
            reward=load(rm_path, frozen=True) if score_with_model else None,
        )
    elif method == "d-lora-ppo":
        actor = adapted(sft_path, ("actor",), reference_adapter)
        critic = adapted(rm_path, ("critic",))
        models = MethodModels(
            method, actor, critic, reference=actor, reward=critic if score_with_model else None
        )
    else:
        names = ("joint",) if method == "j-hydra-ppo" else ("actor", "critic")
        model = adapted(sft_path, names, reference_adapter)
        models = MethodModels(
            method, model, model, reference=model, reward=model if score_with_model else None
        )
    _check_head(models, rm_path)
    return models


def models_of(
    config: PPOConfig, *, device: str | torch.device | None = None, sharded: bool = False
) -> tuple[MethodModels, RewardFn | None]:
    """The models that a configuration names, and its reward function where it has one.

    ``reward_fn`` is imported; a ``reward_model_path`` that is a sequence classifier becomes a
    reward function with its own tokenizer; any other is a Hydra checkpoint with a reward head.

    Args:
        config: Names them.
        device: Where to.
        sharded: They are still to be split over processes: they stay on the CPU until then.

    Raises:
        UserError: see :func:`build_method`, ``load_reward_fn`` and ``ClassifierReward``.
    """
    config.validate()
    if not config.sft_model_path:
        raise UserError("sft_model_path is needed: the model the policy starts from")
    reward_path = config.reward_model_path
    reward_fn: RewardFn | None = None
    if config.reward_fn is not None:
        if reward_path is not None:
            raise UserError("reward_fn and reward_model_path exclude each other")
        reward_fn = load_reward_fn(config.reward_fn)
    elif reward_path is not None and is_classifier(reward_path):
        reward_fn = ClassifierReward(
            reward_path,
            device=device or "cpu",
            batch_size=config.per_device_train_batch_size,
            apply_chat_template=config.apply_chat_template,
        )
        reward_path = None
    models = build_method(
        config.method,
        config.sft_model_path,
        reward_path,
        lora=config,
        dtype=config.dtype,
        device=None if sharded else device,
        reference_adapter=config.reference_adapter,
        score_with_model=reward_fn is None,
    )
    return models, reward_fn


def is_classifier(path: str | Path) -> bool:
    """Whether a checkpoint is a sequence classifier, by its configuration.

    Raises:
        UserError: there is no readable configuration.
    """
    with hub.loading("a reward model", path):
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    return any("SequenceClassification" in name for name in config.architectures or [])


def method_from_model(
    method: str, model: HydraModel, *, lora: LoraSettings | None = None
) -> MethodModels:
    """The models of a method, made from one model in memory (copied as often as it is held).

    Raises:
        UserError: no such method, or the model already has adapters.
    """
    if method not in METHODS:
        raise UserError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if model.adapters:
        raise UserError("method_from_model needs a model without adapters")

    def clone(adapters=(), frozen=False) -> HydraModel:
        other = copy_model(model)
        if adapters:
            return with_adapters(other, adapters, lora)
        return other.requires_grad_(False) if frozen else other

    if method in ("ppo", "lora-ppo"):
        lora_on = method == "lora-ppo"
        return MethodModels(
            method,
            actor=clone(("actor",) if lora_on else ()),
            critic=clone(("critic",) if lora_on else ()),
            reference=clone(frozen=True),
            reward=clone(frozen=True),
        )
    if method == "d-lora-ppo":
        actor, critic = clone(("actor",)), clone(("critic",))
        return MethodModels(method, actor, critic, actor, critic)
    one = clone(("joint",) if method == "j-hydra-ppo" else ("actor", "critic"))
    return MethodModels(method, one, one, one, one)


def copy_model(model: HydraModel) -> HydraModel:
    """A deep copy of a model without adapters: its own storage, heads included."""
    return HydraModel(
        copy.deepcopy(model.causal_lm),
        reward_head=copy.deepcopy(model.reward_head),
        value_head=copy.deepcopy(model.value_head),
    )


def with_adapters(
    model: HydraModel,
    adapters: Sequence[str],
    lora: LoraSettings | None = None,
    *,
    reference_adapter: str | None = None,
) -> HydraModel:
    """``model`` with adapters put on its own decoder (in place; use the result)."""
    return HydraModel(
        model.causal_lm,
        adapters=adapters,
        lora_config=lora_config_of(lora or LoraSettings(), model.causal_lm),
        reward_head=model.reward_head,
        value_head=model.value_head,
        reference_adapter=reference_adapter,
    )


def lora_config_of(lora: LoraSettings, causal_lm: Any):
    """PEFT's LoraConfig for a model.

    Raises:
        UserError: it asks for layers or modules that the model does not have.
    """
    lora.validate_lora()
    trunk = trunk_of(causal_lm)
    count = len(blocks(trunk))
    layers = lora.lora_layers_to_transform
    if lora.lora_last_k is not None:
        if lora.lora_last_k > count:
            raise UserError(f"lora_last_k is {lora.lora_last_k}; the model has {count} blocks")
        layers = list(range(count - lora.lora_last_k, count))
    if layers is not None and not all(0 <= layer < count for layer in layers):
        raise UserError(f"lora_layers_to_transform {layers} leaves the model's {count} blocks")
    return default_lora_config(
        causal_lm,
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=lora.lora_target_modules,
        layers_to_transform=layers,
    )


def _trained(model: HydraModel, role: str) -> list[nn.Parameter]:
    adapter = model.role(role).adapter
    if adapter is not None:
        return model.adapter_parameters(adapter)
    # In full: the decoder. The critic's causal head has no use and gets no gradient.
    head = {id(p) for p in model.causal_lm.get_output_embeddings().parameters()}
    embedding = {id(p) for p in model.causal_lm.get_input_embeddings().parameters()}
    unused = head - embedding if role == "critic" else set()
    return [p for p in model.base.parameters() if p.requires_grad and id(p) not in unused]


@torch.no_grad()
def _kl_of_two_heads(
    heads: tuple[LMHead, LMHead],
    hidden: tuple[Tensor, Tensor],  # each (B, T, D)
    mask: Tensor,  # (B, T)
    temperature: float,
    rows: int = 64,  # of logits held at a time
) -> Tensor:
    kl = torch.zeros(mask.shape, device=mask.device)
    kept = mask.nonzero(as_tuple=True)
    for b, t in zip(kept[0].split(rows), kept[1].split(rows), strict=True):
        new, ref = (
            torch.log_softmax(head.logits(h[b, t]).float() / temperature, -1)
            for head, h in zip(heads, hidden, strict=True)
        )
        kl[b, t] = (new.exp() * (new - ref)).sum(-1)
    return kl


def _check_head(models: MethodModels, path: str | Path) -> None:
    if models.reward is not None and not bool(models.reward.reward_head.weight.any()):
        raise UserError(
            f"{path} has no reward head ({REWARD_HEAD}); train one with "
            "`hydra-rlhf sft --objective hydra`, or give --reward-fn or --reward-model-path"
        )
