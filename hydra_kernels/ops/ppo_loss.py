"""Clipped PPO loss of a policy, a value function, or both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hydra_kernels import backends  # noqa: F401  registers the kernels
from hydra_kernels.backends import recording, registry
from hydra_kernels.backends.reference import ppo_loss as reference
from hydra_kernels.backends.token_ops import PPOInputs
from hydra_kernels.ops.once import once

_OP = "ppo_loss"


class PPOLoss(NamedTuple):
    """Means over the counted tokens, 0-d float32 (float64 where the inputs are).

    ``loss``, ``policy_loss``, ``value_loss``, ``entropy`` and ``kl`` are differentiable; the others
    are statistics.
    """

    loss: Tensor
    policy_loss: Tensor
    value_loss: Tensor
    entropy: Tensor
    kl: Tensor
    approx_kl: Tensor
    clipfrac: Tensor
    vf_clipfrac: Tensor
    ratio: Tensor


def ppo_loss(
    logprobs: Tensor | None,
    values: Tensor | None,
    *,
    old_logprobs: Tensor | None,
    old_values: Tensor | None,
    advantages: Tensor | None,
    returns: Tensor | None,
    mask: Tensor,
    cliprange: float = 0.2,
    cliprange_value: float = 0.2,
    vf_coef: float = 0.1,
    entropy: Tensor | None = None,
    ent_coef: float = 0.0,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
    backend: str | None = None,
) -> PPOLoss:
    """Clipped surrogate of PPO plus its clipped value loss, with all statistics, in one pass.

    ``loss = policy_loss + vf_coef * value_loss - ent_coef * entropy + kl_coef * kl``, where, with
    ``r = exp(logprobs - old_logprobs)`` and all means over the tokens that count,

    - ``policy_loss`` is the mean of ``max(-A r, -A clamp(r, 1 - cliprange, 1 + cliprange))``:
      Schulman et al. 2017, arXiv:1707.06347, eq. 7, negated so that it is minimised;
    - ``value_loss`` is the mean of ``0.5 max((v - R)^2, (clamp(v, v_old - c, v_old + c) - R)^2)``
      with ``c = cliprange_value``.

    ``log r`` is cut at +-60, so that finite inputs give finite losses. By hand: a token with
    ``r = e`` and ``A = 1`` costs -1.2 and has no gradient; with ``A = -1`` it costs 2.718.

    Args:
        logprobs: (B, T) log-probability, in nats, of each sampled token under the policy. None
            leaves the policy out: ``policy_loss``, ``approx_kl``, ``clipfrac`` and ``ratio`` are 0.
        values: (B, T) value estimates. None leaves the value function out.
        old_logprobs: (B, T) as ``logprobs``, under the policy that sampled. A constant, as are the
            next three.
        old_values: (B, T) value estimates when the tokens were sampled.
        advantages: (B, T).
        returns: (B, T) targets of the value function.
        mask: (B, T) bool, True where the token counts. What the others hold at False does not
            matter, inf and NaN included. With no True at all, everything is 0.
        cliprange: Half-width of the trust region on ``r``, in (0, 1).
        cliprange_value: How far, > 0, a value may move from ``old_values``; inf does not clip.
        vf_coef: Weight of ``value_loss``.
        entropy: (B, T) entropy of the policy at each token, in nats.
        ent_coef: Weight of the mean entropy, which is maximised.
        kl: (B, T) divergence from a reference policy at each token, in nats.
        kl_coef: Weight of the mean divergence.
        backend: "cuda", "cpu", "triton" or "reference"; None for the first that can run these.

    Returns:
        :class:`PPOLoss`. ``approx_kl`` is the mean of ``(r - 1) - log r`` (Schulman's k3),
        ``clipfrac`` and ``vf_clipfrac`` the share of tokens whose clipped branch is strictly the
        larger, ``ratio`` the mean of ``r``.

    Raises:
        ValueError: shapes or devices differ, a tensor that goes with ``logprobs`` or ``values`` is
            missing, mask is not bool, or a clip range is out of range.
        NotImplementedError: ``backend`` was named and cannot run these tensors.
    """
    if logprobs is None:
        old_logprobs = advantages = None
    if values is None:
        old_values = returns = None
    tensors: tuple[Tensor | None, ...]
    tensors = (logprobs, values, old_logprobs, old_values, advantages, returns, entropy, kl)
    coefs = (cliprange, cliprange_value, vf_coef, ent_coef, kl_coef)
    watched = recording.watched()
    if not watched and _alike(tensors, mask) and 0.0 < cliprange < 1.0 and cliprange_value > 0.0:
        some = logprobs if logprobs is not None else values
        chosen = registry.select_alike(_OP, backend, some)
    else:
        _check(tensors, mask, cliprange, cliprange_value)
        # Half precision is widened, which is exact; float64 stays, for the reference.
        tensors = tuple(
            t.float() if t is not None and t.dtype in (torch.float16, torch.bfloat16) else t
            for t in tensors
        )
        tensors = (*tensors[:2], *map(_constant, tensors[2:6]), *tensors[6:])
        chosen = registry.select(_OP, backend, *tensors, mask)
        if chosen != registry.REFERENCE:
            tensors = tuple(None if t is None else t.contiguous() for t in tensors)
            mask = mask.contiguous()
    if chosen == registry.REFERENCE:
        constants = tuple(map(_constant, tensors[2:6]))
        coefs_and_kl = (*coefs[:3], tensors[6], ent_coef, tensors[7], kl_coef)
        return PPOLoss(*reference.ppo_loss(*tensors[:2], *constants, mask, *coefs_and_kl))
    inputs = PPOInputs(*tensors, mask, *coefs)
    if watched:
        stats = torch.ops.hydra.ppo_loss_fwd(*inputs, chosen)[0]
        loss, policy_loss, value_loss, entropy_, kl_, *rest, _ = stats.unbind(0)
        return PPOLoss(loss, policy_loss, value_loss, entropy_, kl_, *(t.detach() for t in rest))
    # Outside of the autograd function, which is given no more than what has gradients: a call of
    # one takes longer than the kernel, by what goes in and comes out of it.
    stats, dlogprobs, dvalues = registry.kernel(_OP, chosen).fwd(inputs)
    means = stats.unbind(0)
    if not torch.is_grad_enabled():
        return PPOLoss._make(means[:9])
    made = (stats, dlogprobs, dvalues, means, inputs, chosen)
    losses = _apply(made, inputs.logprobs, inputs.values, inputs.entropy, inputs.kl)
    return PPOLoss._make(losses + means[len(losses) : 9])


def _constant(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach()


_NAMES = (
    "logprobs",
    "values",
    "old_logprobs",
    "old_values",
    "advantages",
    "returns",
    "entropy",
    "kl",
)


def _alike(tensors: tuple[Tensor | None, ...], mask: Tensor) -> bool:
    """Whether there is nothing to refuse and nothing to convert: the usual call, in one look
    at each tensor. What is not alike goes through ``_check``, which says why, if it is wrong."""
    logprobs, values, old_logprobs, old_values, advantages, returns, _, _ = tensors
    if logprobs is None:
        if values is None:
            return False
    elif old_logprobs is None or advantages is None:
        return False
    if values is not None and (old_values is None or returns is None):
        return False
    shape, device, float32, plain = mask.shape, mask.device, torch.float32, registry.PLAIN
    for t in tensors:
        if t is not None and (
            type(t) not in plain
            or t.dtype is not float32
            or t.shape != shape
            or t.device != device
            or not t.is_contiguous()
        ):
            return False
    return mask.dtype is torch.bool and type(mask) in plain and mask.is_contiguous()


def _check(
    tensors: tuple[Tensor | None, ...], mask: Tensor, cliprange: float, cliprange_value: float
) -> None:
    named = dict(zip(_NAMES, tensors, strict=True))
    needs = {"logprobs": ("old_logprobs", "advantages"), "values": ("old_values", "returns")}
    for name, others in needs.items():
        missing = [other for other in others if named[other] is None]
        if named[name] is not None and missing:
            raise ValueError(f"{_OP}: {name} needs {' and '.join(missing)}, got None")
    for name, t in named.items():
        if t is None:
            continue
        if t.shape != mask.shape:
            raise ValueError(
                f"{_OP}: shapes differ: {name} is {tuple(t.shape)}, mask is {tuple(mask.shape)}"
            )
        if t.device != mask.device:
            raise ValueError(
                f"{_OP}: devices differ: {name} is on {t.device}, mask on {mask.device}"
            )
        if not t.is_floating_point():
            raise ValueError(f"{_OP}: {name} must be floating point, got {t.dtype}")
    if mask.dtype != torch.bool:
        raise ValueError(f"{_OP}: mask must be bool, got {mask.dtype}")
    if not 0.0 < cliprange < 1.0:
        raise ValueError(f"{_OP}: cliprange must be in (0, 1), got {cliprange}")
    if not cliprange_value > 0.0:
        raise ValueError(f"{_OP}: cliprange_value must be > 0, got {cliprange_value}")


def _weight(share: Tensor | None, *terms: tuple[float, Tensor | None]) -> Tensor | None:
    """The sum of the upstream gradients that are there, by their coefficients, times share."""
    total = None
    for coef, upstream in terms:
        if upstream is None or coef == 0.0:
            continue
        term = upstream if coef == 1.0 else coef * upstream
        total = term if total is None else total + term
    return total if share is None or total is None else total * share


def _times(gradient: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return torch.zeros_like(gradient, dtype=torch.float32)
    return gradient * weight


def _grads(
    upstream: Sequence[Tensor | None],  # of loss, policy_loss, value_loss, entropy and kl
    stats: Tensor,  # (10,) the last one is 1 / count
    dlogprobs: Tensor | None,  # (B, T) as PPOKernel.scaled has it; 0 where masked
    dvalues: Tensor | None,
    mask: Tensor | None,  # with entropy or kl
    vf_coef: float,
    ent_coef: float,
    kl_coef: float,
    chosen: str,
    wanted: tuple[bool, bool, bool, bool],  # logprobs, values, entropy, kl
) -> tuple[Tensor | None, ...]:
    """Everything is linear in the upstream scalars, so that backward only scales."""
    g_loss, g_policy, g_value, g_entropy, g_kl = upstream
    scaled = registry.kernel(_OP, chosen).scaled  # type: ignore[attr-defined]
    share = None if scaled and not (wanted[2] or wanted[3]) else stats[9]
    left, unit = (None, vf_coef or 1.0) if scaled else (share, 1.0)
    out: list[Tensor | None] = [None, None, None, None]
    if wanted[0] and dlogprobs is not None:
        out[0] = _times(dlogprobs, _weight(left, (1.0, g_loss), (1.0, g_policy)))
    if wanted[1] and dvalues is not None:
        out[1] = _times(dvalues, _weight(left, (vf_coef / unit, g_loss), (1.0 / unit, g_value)))
    if mask is not None:
        if wanted[2]:
            out[2] = _times(mask, _weight(share, (-ent_coef, g_loss), (1.0, g_entropy)))
        if wanted[3]:
            out[3] = _times(mask, _weight(share, (kl_coef, g_loss), (1.0, g_kl)))
    return tuple(out)


class _PPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, made, *given):
        stats, dlogprobs, dvalues, means, inputs, chosen = made
        scaled = registry.kernel(_OP, chosen).scaled  # type: ignore[attr-defined]
        num_losses, mask = (3, None) if given[2] is None and given[3] is None else (5, inputs.mask)
        # Whether the gradients made are those of the loss, to be handed out as they are.
        whole = scaled and mask is None and inputs.vf_coef != 0.0
        ctx.save_for_backward(dlogprobs, dvalues, mask)
        # stats are not saved: of what its views show a caller may change anything
        ctx.rest = (whole, given, stats, (*inputs[11:14], chosen))  # vf_coef, ent_coef, kl_coef
        # Upstream gradients that are not there stay None: no launches to make and add zeros.
        ctx.set_materialize_grads(False)
        # Not views of one tensor in autograd's eyes, which would refuse ``loss += more``. The mean
        # of what was not given is a constant.
        return tuple([t.data for t in means[:num_losses]])

    @staticmethod
    def backward(ctx, g_loss, g_policy, g_value, g_entropy=None, g_kl=None):
        whole, given, stats, settings = ctx.rest
        dlogprobs, dvalues, mask = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:]
        again, compiling = torch.is_grad_enabled(), torch.compiler.is_compiling()
        if (
            whole
            and g_policy is None
            and g_value is None
            and g_loss is not None
            and not (again or compiling)
            and not _keeps_graph()  # so that nobody asks for what is saved a second time
            and g_loss.is_cpu
            and not recording.batched(g_loss)
            and g_loss.item() == 1.0
        ):
            return (
                None,
                dlogprobs if wanted[0] else None,
                dvalues if wanted[1] else None,
                None,
                None,
            )
        upstream = (g_loss, g_policy, g_value, g_entropy, g_kl)
        d = _grads(upstream, stats, dlogprobs, dvalues, mask, *settings, wanted)
        if again and not compiling:
            d = once(_OP, d, (*given, *upstream))
        return (None, *d)


# Whether the pass that runs leaves the graph for another one.
_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph

# What Function.apply calls in the end, without the 5 us of asking about torch.func's transforms,
# which the choice of the backend has asked about.
_apply = super(torch.autograd.Function, _PPOLoss).apply


@torch.library.custom_op(
    "hydra::ppo_loss_fwd",
    mutates_args=(),
    schema="(Tensor? logprobs, Tensor? values, Tensor? old_logprobs, Tensor? old_values, "
    "Tensor? advantages, Tensor? returns, Tensor? entropy, Tensor? kl, Tensor mask, "
    "float cliprange, float cliprange_value, float vf_coef, float ent_coef, float kl_coef, "
    "str chosen) -> (Tensor, Tensor, Tensor)",
)
def _op(*args):
    """The fields of PPOInputs, and the backend."""
    stats, dlogprobs, dvalues = registry.kernel(_OP, args[14]).fwd(PPOInputs._make(args[:14]))
    # A registered op returns tensors only: an empty one stands for None.
    empty = stats.new_empty(0)
    return (
        stats,
        empty if dlogprobs is None else dlogprobs,
        empty.clone() if dvalues is None else dvalues,
    )


@_op.register_fake
def _(logprobs, values, *args):
    mask = args[6]
    stats = torch.empty(10, dtype=torch.float32, device=mask.device)
    like = [stats.new_empty(0 if t is None else mask.shape) for t in (logprobs, values)]
    return stats, like[0], like[1]


def _setup_context(ctx, inputs, output):
    stats, dlogprobs, dvalues = output
    ctx.save_for_backward(
        stats,
        None if inputs[0] is None else dlogprobs,
        None if inputs[1] is None else dvalues,
        inputs[8],
    )
    ctx.settings = inputs[11:15]


def _backward(ctx, grad_stats, _dlogprobs, _dvalues):
    need = ctx.needs_input_grad
    wanted = (need[0], need[1], need[6], need[7])
    d = _grads(grad_stats.unbind(0)[:5], *ctx.saved_tensors, *ctx.settings, wanted)
    return (d[0], d[1], None, None, None, None, d[2], d[3], *(None,) * 7)


_op.register_autograd(_backward, setup_context=_setup_context)
