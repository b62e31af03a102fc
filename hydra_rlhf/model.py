"""HydraModel: one decoder, its heads, and roles that are an adapter id and a head.

A *role* is data. ``actor`` is the causal head over the actor adapter, ``critic`` the value head
over the critic adapter, ``reference`` and ``reward`` the causal and the reward head over the
decoder with adapters off. Adapter ids travel with each forward and are kept by it, so that a later
role, a recomputation in backward, or another thread cannot change them. Nothing here touches
``requires_grad`` to change roles: the optimizer sees every adapter from the start.

One class, a little past 500 lines: what it is made of is in lora.py, roles.py, scoring.py, trunk.py
and pretrained.py, and what is left are its methods.

Source: Santacroce et al. 2023, arXiv:2309.00754, section 3.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import hydra_kernels.peft
from hydra_kernels.nn import LMHead
from hydra_rlhf import trunk as trunks
from hydra_rlhf.attention import without_cudnn
from hydra_rlhf.errors import UserError, first_line
from hydra_rlhf.lora import copy_adapter, default_lora_config, linear_names
from hydra_rlhf.pretrained import (
    REWARD_HEAD,
    VALUE_HEAD,
    copy_of_head,
    head_file,
    head_width,
    load_causal_lm,
    load_head,
    load_heads,
    new_head,
    save_head,
    whole,
)
from hydra_rlhf.roles import ROLES, Role, Score, check_roles, last_token, position_ids
from hydra_rlhf.scoring import hidden_of, of_logprobs
from hydra_rlhf.trunk import Prefix

__all__ = [  # what other modules import from here, wherever it stands
    "IGNORE",
    "REWARD_HEAD",
    "ROLES",
    "VALUE_HEAD",
    "HydraModel",
    "Role",
    "Score",
    "default_lora_config",
    "last_token",
    "linear_names",
    "load_causal_lm",
    "position_ids",
]
IGNORE = -100


class HydraModel(nn.Module):
    """A transformers causal LM with a reward head, a value head and adapters.

    Args:
        causal_lm: Any ``AutoModelForCausalLM``, as it is.
        adapters: ("actor", "critic"), ("joint",), ("actor",), ("critic",) or (). With adapters the
            decoder is frozen; without, it is left as it came.
        lora_config: PEFT's, for every adapter; None adapts every linear layer of the blocks with
            rank 128. A ``layers_to_transform`` that starts above 0 gives a shared prefix.
        reward_head: (D -> 1) linear, frozen; None starts a new one at zero.
        value_head: (D -> 1) linear, trained, its bias too where it has one; None copies the reward
            head.
        reference_adapter: Folder of a PEFT adapter that, frozen, makes the reference policy.

    Raises:
        UserError: an adapter set that no method has, a PEFT folder that cannot be read, layers that
            cannot be adapted, or an output head that is not linear.
    """

    base: Any  # transformers' model, or PEFT's around it
    lm_head: LMHead

    def __init__(
        self,
        causal_lm: nn.Module,
        *,
        adapters: Sequence[str] = (),
        lora_config: peft.LoraConfig | None = None,
        reward_head: nn.Linear | None = None,
        value_head: nn.Linear | None = None,
        reference_adapter: str | None = None,
    ):
        super().__init__()
        without_cudnn()
        adapters = tuple(adapters)
        known = ((), ("actor",), ("critic",), ("joint",), ("actor", "critic"))
        if adapters not in known:
            raise UserError(f"adapters must be one of {known}, got {adapters}")
        self.adapters: tuple[str, ...] = adapters
        self.base = causal_lm
        device = next(causal_lm.parameters()).device
        width = head_width(causal_lm)
        # float32 whatever the decoder is: one column, and rewards are compared by small margins.
        self.reward_head = reward_head or new_head(width, device)
        self.value_head = value_head or copy_of_head(self.reward_head)
        self.reward_head.requires_grad_(False)
        self._recompute: str | None = None
        if adapters:
            self._add_adapters(lora_config, reference_adapter)
        elif reference_adapter is not None:
            raise UserError("reference_adapter needs a method with adapters")
        # Not a child: it shares the decoder's own head parameters.
        try:
            self.__dict__["lm_head"] = LMHead.from_model(self.causal_lm)
        except ValueError as e:
            raise UserError(first_line(e)) from e

    def _add_adapters(self, config: peft.LoraConfig | None, reference: str | None) -> None:
        names = list(self.adapters)
        try:
            config = config or default_lora_config(self.base)
            self.base = peft.get_peft_model(self.base, config, adapter_name=names[0])
            for name in names[1:]:
                self.base.add_adapter(name, config)
        except (ValueError, NotImplementedError) as e:
            kind = self.base.config.model_type
            raise UserError(f"cannot put adapters on this {kind} model: {first_line(e)}") from e
        if reference is not None:
            self._load_adapter("reference", reference)
            if "actor" in names or "joint" in names:
                copy_adapter(self.base, "reference", "actor" if "actor" in names else "joint")
        left = hydra_kernels.peft.fuse(self.base).left
        if left:
            name, why = next(iter(left.items()))
            raise UserError(
                f"{len(left)} of the adapted layers cannot take their adapter from a role, such as "
                f"{name}: {why}; leave them out of lora_target_modules"
            )
        # PEFT leaves only the adapter added first trainable; here all are, from start to end.
        for name, parameter in self.base.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_(".reference." not in name)

    def _load_adapter(self, name: str, path: str) -> None:
        try:
            self.base.load_adapter(path, name, is_trainable=False)
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as e:
            raise UserError(f"cannot read a LoRA adapter from {path}: {first_line(e)}") from e

    # Parts

    @property
    def causal_lm(self) -> Any:
        """transformers' model, its linears fused in place where they have adapters."""
        return self.base.get_base_model() if self.adapters else self.base

    @property
    def trunk(self) -> Any:
        """The decoder without its head, as ``AutoModel`` gives it."""
        return trunks.trunk_of(self.causal_lm)

    @property
    def config(self) -> transformers.PretrainedConfig:
        return self.causal_lm.config

    @property
    def device(self) -> torch.device:
        return self.reward_head.weight.device

    def role(self, name: str) -> Role:
        """The adapter and the head behind a role.

        Raises:
            ValueError: no such role.
        """
        check_roles((name,))
        head = {"actor": "lm", "reference": "lm", "critic": "value", "reward": "reward"}[name]
        if name in ("actor", "critic"):
            adapter = "joint" if "joint" in self.adapters else name
            return Role(adapter if adapter in self.adapters else None, head)
        if name == "reference" and "reference" in self._adapter_index():
            return Role("reference", head)
        return Role(None, head)

    def _adapter_index(self) -> dict[str, int]:
        if not self.adapters:
            return {}
        names = hydra_kernels.peft.adapter_names(self.base)
        return {name: i for i, name in enumerate(names)}

    def adapter_id(self, role: str | None) -> int:
        """The id of a role's adapter; -1 is the decoder with adapters off."""
        adapter = None if role is None else self.role(role).adapter
        return -1 if adapter is None else self._adapter_index()[adapter]

    def adapter_parameters(self, adapter: str) -> list[nn.Parameter]:
        """The LoRA factors of one adapter, in the model's order."""
        mark = f".{adapter}."
        return [p for n, p in self.base.named_parameters() if "lora_" in n and mark in n]

    def first_adapted_layer(self) -> int:
        """Index of the first decoder block with an adapter: blocks below are every role's."""
        if not self.adapters:
            return 0
        for i, block in enumerate(trunks.blocks(self.trunk)):
            if any("lora_" in name for name, _ in block.named_parameters()):
                return i
        return len(trunks.blocks(self.trunk))

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, bool] | None = None
    ) -> None:
        """Recomputes each block in backward; ``{"use_reentrant": True}`` picks torch's older kind.

        Unlike transformers' own it also works in eval mode, which PPO is in (no dropout).
        """
        reentrant = (gradient_checkpointing_kwargs or {}).get("use_reentrant", False)
        self._recompute = "reentrant" if reentrant else "non-reentrant"

    def gradient_checkpointing_disable(self) -> None:
        self._recompute = None

    # Passes

    def hidden(
        self,
        input_ids: Tensor,  # (B, L)
        attention_mask: Tensor,  # (B, L), nonzero where there is a token
        *,
        role: str | None = None,
        adapter_ids: int | Tensor | None = None,
        prefix: Prefix | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """The trunk's last hidden state under a role's adapter.

        Positions are counted from the attention mask, so left padding does not move a sequence.

        Args:
            input_ids: (B, L).
            attention_mask: (B, L), nonzero where there is a token; or, with ``positions``,
                (B, 1, L, L), which is added to the scores of attention.
            role: Whose adapter; None is the decoder with adapters off.
            adapter_ids: In place of a role: an id, or (B,) ids of the rows; -1 is off.
            prefix: From :meth:`compute_prefix` on these sequences: start there.
            positions: (B, L) in place of those counted.

        Returns:
            (B, L, D), in the decoder's dtype.
        """
        ids = self.adapter_id(role) if adapter_ids is None else adapter_ids
        with self._adapters(ids):
            return trunks.run(
                self.trunk,
                prefix=prefix,
                recompute=self._recompute if torch.is_grad_enabled() else None,
                context=lambda: self._adapters(ids),
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids(attention_mask) if positions is None else positions,
            )

    def _adapters(self, ids: int | Tensor) -> contextlib.AbstractContextManager:
        if not self.adapters:
            return contextlib.nullcontext()
        return hydra_kernels.peft.adapter_ids(self.base, ids)

    def compute_prefix(self, input_ids: Tensor, attention_mask: Tensor) -> Prefix | None:
        """Activations below the first adapted block; None where the first block has an adapter."""
        layer = self.first_adapted_layer()
        if layer == 0 or layer == len(trunks.blocks(self.trunk)):
            return None
        with self.no_dropout(), self._adapters(-1):
            return trunks.compute_prefix(
                self.trunk,
                layer,
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids(attention_mask),
            )

    def forward_role(
        self, role: str, input_ids: Tensor, attention_mask: Tensor, *, prefix: Prefix | None = None
    ) -> Tensor:
        """What a role says of every position, dropout off.

        Returns:
            Logits (B, L, V) in the decoder's dtype for ``actor`` and ``reference``; (B, L) float32
            for ``critic`` and ``reward``. :meth:`score` gives log-probabilities without logits.
        """
        with self.no_dropout():
            hidden = self.hidden(input_ids, attention_mask, role=role, prefix=prefix)
        head = self.role(role).head
        return self.lm_head.logits(hidden) if head == "lm" else self._head(head, hidden)

    def _head(self, head: str, hidden: Tensor) -> Tensor:
        module = self.value_head if head == "value" else self.reward_head
        device = hidden.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return module(hidden.float()).squeeze(-1)
        with torch.autocast(device, enabled=False):  # the heads are float32
            return module(hidden.float()).squeeze(-1)

    def score(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        response_mask: Tensor,
        *,
        roles: Sequence[str] = ROLES,
        batched: bool = False,
        reuse_reference_reward: bool = True,
        temperature: float = 1.0,
        kl: bool = False,
        entropy: bool = False,
        prefix: Prefix | None = None,
        detach_values: bool = False,
        keep_states: dict[str, Tensor] | None = None,
    ) -> Score:
        """Log-probabilities, values and scores of responses, without logits in memory.

        Dropout is off. Differentiable, so that the update phase runs through it too; the reference
        and the reward are constants.

        Args:
            input_ids: (B, L) prompt and response; the responses are the last T columns.
            attention_mask: (B, L), nonzero where there is a token.
            response_mask: (B, T) bool, True on the response tokens that count.
            roles: Which of actor, critic, reference, reward.
            batched: One pass over len(passes) * B rows with an adapter id each (the weights are
                read once), instead of one pass after another. The same numbers to rounding.
            reuse_reference_reward: One adapter-off pass for both roles.
            temperature: Divides the logits of actor and reference.
            kl: Also the exact KL; needs actor and reference.
            entropy: Also the actor's entropy.
            prefix: From :meth:`compute_prefix` on these sequences.
            detach_values: Stop the values' gradients at the trunk's output: only their head learns.
            keep_states: Filled with the (B, T, D) head inputs of each role.

        Returns:
            See :class:`Score`.

        Raises:
            ValueError: a role that does not exist, a KL without actor and reference, or T not
                below L.
        """
        check_roles(roles, kl=kl)
        tokens = response_mask.shape[1]
        if not 0 < tokens < input_ids.shape[1]:
            raise ValueError(
                f"score: responses are the last {tokens} of {input_ids.shape[1]} columns; "
                "at least one column must be prompt"
            )
        with self.no_dropout():
            hidden = hidden_of(
                self, input_ids, attention_mask, roles, batched, reuse_reference_reward, prefix
            )
        targets = input_ids[:, -tokens:].masked_fill(~response_mask, IGNORE)  # (B, T)
        states = {role: h[:, -tokens - 1 : -1] for role, h in hidden.items()}  # (B, T, D)

        if keep_states is not None:
            keep_states.update(states)

        out = of_logprobs(self.lm_head, states, targets, temperature, kl=kl, entropy=entropy)
        if "critic" in states:
            critic = states["critic"].detach() if detach_values else states["critic"]
            values = self._head("value", critic)
            out = out._replace(values=torch.where(response_mask, values, 0.0))
        if "reward" in hidden:
            last = last_token(response_mask) + input_ids.shape[1] - tokens  # (B,)
            rows = torch.arange(last.shape[0], device=last.device)
            at_last = hidden["reward"][rows, last].detach()  # of a pass that may be the actor's too
            out = out._replace(scores=self._head("reward", at_last))
        return out

    # DDP and its kin run forward, so the differentiable work is there.
    forward = score

    def num_passes(self, roles: Sequence[str] = ROLES, *, reuse: bool = True) -> int:
        """Trunk passes that :meth:`score` makes for ``roles``."""
        adapters = [self.role(role).adapter for role in roles]
        off = adapters.count(None)
        on = len({a for a in adapters if a is not None})
        return on + (min(off, 1) if reuse else off)

    @torch.no_grad()
    def generate(self, *args, role: str = "actor", **kwargs):
        """transformers' ``generate`` under a role's adapter, dropout off."""
        with self.no_dropout(), self._adapters(self.adapter_id(role)):
            return self.causal_lm.generate(*args, **kwargs)

    @contextlib.contextmanager
    def no_dropout(self) -> Iterator[None]:
        """Eval mode inside, and the mode from before after."""
        training = [m for m in self.base.modules() if m.training]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True

    # Files

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        adapters: Sequence[str] = (),
        lora_config: peft.LoraConfig | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        reference_adapter: str | None = None,
        trust_remote_code: bool = False,
    ) -> HydraModel:
        """Loads a Hugging Face model, and the heads in its folder.

        A checkpoint of TRL's ``AutoModelForCausalLMWithValueHead`` brings its value head along.

        Args:
            path: Folder or hub name for ``AutoModelForCausalLM``.
            adapters: New adapters to put on it; see the class.
            lora_config: Of those.
            dtype: Of the decoder; None takes the checkpoint's.
            device: Where to; None leaves it on the CPU.
            reference_adapter: See the class.
            trust_remote_code: Run code that comes with the model.

        Raises:
            UserError: there is no such model, or a head file does not fit it.
        """
        causal_lm = load_causal_lm(path, dtype=dtype, trust_remote_code=trust_remote_code)
        if device is not None:
            causal_lm.to(device)
        heads = load_heads(path, head_width(causal_lm), next(causal_lm.parameters()).device)
        return cls(
            causal_lm,
            adapters=adapters,
            lora_config=lora_config,
            reference_adapter=reference_adapter,
            **heads,
        )

    def save_pretrained(self, path: str | Path) -> None:
        """Writes the Hugging Face model, the reward head and, with adapters, those too.

        The model's files are the decoder with adapters off: any transformers code loads them. Where
        processes share the weights each has to call this, and the first one writes.
        """
        path = Path(path)
        state = {
            name.replace(".base_layer.", "."): whole(value)
            for name, value in self.causal_lm.state_dict().items()
            if "lora_" not in name
        }
        if any(isinstance(p, DTensor) for p in self.parameters()) and dist.get_rank() != 0:
            return
        self.causal_lm.save_pretrained(path, state_dict=state)
        save_head(self.reward_head, path, REWARD_HEAD)
        if self.adapters:
            self.save_adapters(path)

    def save_adapters(self, path: str | Path, *, base_model: str | None = None) -> None:
        """Writes each adapter as a plain PEFT folder named after it, and the heads in ``heads``.

        Heads are separate files, because vLLM and others refuse adapters with modules_to_save.

        Args:
            path: Folder; ``path/actor`` and so on are for ``PeftModel.from_pretrained``.
            base_model: Written as the adapters' base_model_name_or_path.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        for name in self.adapters:
            config = self.base.peft_config[name]
            if base_model is not None:
                config.base_model_name_or_path = base_model
        if self.adapters:
            self.base.save_pretrained(str(path), selected_adapters=list(self.adapters))
        self.save_heads(path)

    def save_heads(self, path: str | Path) -> None:
        """Writes heads/value_head.safetensors and heads/reward_head.safetensors."""
        path = Path(path)
        save_head(self.value_head, path, VALUE_HEAD)
        save_head(self.reward_head, path, REWARD_HEAD)

    def load_adapters(self, path: str | Path) -> None:
        """Reads what :meth:`save_adapters` wrote into the adapters and heads that are here.

        Raises:
            UserError: a file is missing or of other shapes.
        """
        path = Path(path)
        for name in self.adapters:
            file = path / name / "adapter_model.safetensors"
            try:
                state = load_file(file)
                result: Any = peft.set_peft_model_state_dict(self.base, state, adapter_name=name)
            except (OSError, RuntimeError, SafetensorError) as e:
                raise UserError(f"cannot read adapter {name} from {file}: {first_line(e)}") from e
            if result.unexpected_keys:
                raise UserError(f"{file} has weights this model lacks: {result.unexpected_keys[0]}")
            if missing := [key for key in result.missing_keys if f".{name}." in key]:
                raise UserError(f"{file} lacks weights of this model: {missing[0]}")
        for head, name in ((self.reward_head, REWARD_HEAD), (self.value_head, VALUE_HEAD)):
            loaded = load_head(head_file(path, name), head.in_features, head.weight.device)
            if loaded is None:
                continue
            if loaded.bias is not None and head.bias is None:
                raise UserError(f"{path / name} has a bias, which this model's head has not")
            with torch.no_grad():
                head.weight.copy_(loaded.weight)
                if head.bias is not None:
                    head.bias.copy_(0.0 if loaded.bias is None else loaded.bias)
