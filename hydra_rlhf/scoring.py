"""The passes of a scoring call: roles grouped by adapter, one batch or one after another.

Functions of ``HydraModel.score``. B sequences, L columns of which the last T are the response.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hydra_kernels.nn import LMHead
from hydra_rlhf.roles import ABSENT, Score
from hydra_rlhf.trunk import Prefix

if TYPE_CHECKING:
    from hydra_rlhf.model import HydraModel


def hidden_of(
    model: HydraModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    roles: Sequence[str],
    batched: bool,
    reuse: bool,
    prefix: Prefix | None,
) -> dict[str, Tensor]:
    """role -> (B, L, D), in as few passes as the roles' adapters allow."""
    passes: list[list[str]] = []
    for role in roles:
        adapter = model.role(role).adapter
        for group in passes:
            if model.role(group[0]).adapter == adapter and (reuse or adapter is not None):
                group.append(role)
                break
        else:
            passes.append([role])
    hidden: dict[str, Tensor] = {}
    if batched and len(passes) > 1:
        n, batch = len(passes), input_ids.shape[0]
        ids = torch.tensor([model.adapter_id(group[0]) for group in passes])
        ids = ids.repeat_interleave(batch).to(input_ids.device, non_blocking=True)
        every = model.hidden(
            input_ids.repeat(n, 1),
            attention_mask.repeat(n, 1),
            adapter_ids=ids,
            prefix=None if prefix is None else prefix.repeat(n),
        )
        for group, part in zip(passes, every.split(batch), strict=True):
            hidden.update(dict.fromkeys(group, part))
        return hidden
    for group in passes:
        # Reference and reward are constants; only the value and causal heads of trained
        # roles send gradients back.
        constant = all(role in ("reference", "reward") for role in group)
        with torch.no_grad() if constant else contextlib.nullcontext():
            part = model.hidden(input_ids, attention_mask, role=group[0], prefix=prefix)
        hidden.update(dict.fromkeys(group, part))
    return hidden


def of_logprobs(
    lm_head: LMHead,
    states: Mapping[str, Tensor],  # role -> (B, T, D)
    targets: Tensor,  # (B, T), IGNORE where masked
    temperature: float,
    *,
    kl: bool,
    entropy: bool,
) -> Score:
    """What the causal head says of actor and reference, both in one pass over its weight."""
    out = Score()
    if "actor" in states:
        reference = states.get("reference")
        lp: Any = lm_head.logprob(
            states["actor"],
            targets,
            temperature=temperature,
            ref_hidden=None if reference is None else reference.detach(),
        )
        out = out._replace(
            logprobs=lp.logprobs,
            entropy=lp.entropy if entropy else ABSENT,
            ref_logprobs=lp.ref_logprobs,
            kl=lp.kl if kl else ABSENT,
        )
    elif "reference" in states:
        lp = lm_head.logprob(states["reference"], targets, temperature=temperature)
        out = out._replace(ref_logprobs=lp.logprobs.detach())
    return out
