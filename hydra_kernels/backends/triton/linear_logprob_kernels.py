"""The kernels of ``linear_logprob``: what they compute is told in linear_logprob.py, which launches
them."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from hydra_kernels.backends.triton import runtime
from hydra_kernels.backends.triton.tiles import tile_of

INTERPRETED = tl.constexpr(runtime.INTERPRETED)
# Rows of the partial sums, as LogprobSum in csrc/include/hydra/linear_logprob.h.
MAX, SUM, WEIGHTED, DIFFERENCE, TARGET, REF_MAX, REF_SUM, REF_TARGET = map(tl.constexpr, range(8))
NUM_SUMS = tl.constexpr(8)
LOWEST = tl.constexpr(-1.0e38)  # finite: it may be subtracted from itself


@triton.jit
def _exp(x):
    """Below 1e-38 it is 0: two instructions an element in place of five."""
    if INTERPRETED:
        return tl.exp(x)
    else:
        return libdevice.fast_expf(x)


@triton.jit
def _tanh(x):
    # The exponential form loses digits where the series still has them all.
    x2 = x * x
    series = x * (1.0 + x2 * (-1.0 / 3 + x2 * (2.0 / 15 + x2 * (-17.0 / 315 + x2 * (62.0 / 2835)))))
    small = tl.abs(x) < 0.25
    cut = tl.minimum(tl.abs(x), 10.0)  # exp(20) is in range, and tanh is 1 from 9.01 on
    large = 1.0 - 2.0 / (tl.exp(2.0 * cut) + 1.0)
    return tl.where(small, series, tl.where(x < 0.0, -large, large))


@triton.jit
def _logits(
    products, bias, offs_v, inside_v, inv_temperature, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """z and dz / d product."""
    if HAS_BIAS:
        products += tl.load(bias + offs_v, mask=inside_v, other=0.0).to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        tanh = _tanh(products / softcap)
        return tanh * (softcap * inv_temperature), (1.0 - tanh * tanh) * inv_temperature
    else:
        return products * inv_temperature, tl.full(
            products.shape, 1.0, tl.float32
        ) * inv_temperature


@triton.jit
def _products(
    hidden, ref_hidden, weight, first_m, offs_m, keep, first_v, offs_v, inside_v, D,
    stride_hm, stride_hd, stride_rm, stride_rd, stride_wv, stride_wd,
    HAS_REF: tl.constexpr, EVEN_D: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """hidden W^T and ref_hidden W^T, (BLOCK_M, BLOCK_V) float32 each, with one read of W.

    With TMA the three are descriptors. What is outside of them is read as 0; a row that does not
    count is read too, and reaches its own products alone.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_V), dtype=tl.float32)
    ref_acc = tl.zeros((BLOCK_M, BLOCK_V), dtype=tl.float32)
    if TMA:
        for start in range(0, D, BLOCK_D):
            w = weight.load([first_v, start]).T
            acc = tl.dot(hidden.load([first_m, start]), w, acc, input_precision=PRECISION)
            if HAS_REF:
                r = ref_hidden.load([first_m, start])
                ref_acc = tl.dot(r, w, ref_acc, input_precision=PRECISION)
    else:
        offs_d = tl.arange(0, BLOCK_D)
        far_d = offs_d.to(tl.int64)  # of a transposed operand, columns are V or M apart
        x_at = hidden + offs_m[:, None] * stride_hm + far_d[None, :] * stride_hd
        w_at = weight + offs_v[None, :].to(tl.int64) * stride_wv + far_d[:, None] * stride_wd
        if HAS_REF:
            r_at = ref_hidden + offs_m[:, None] * stride_rm + far_d[None, :] * stride_rd
        for start in range(0, D, BLOCK_D):
            x_mask = keep[:, None]
            w_mask = inside_v[None, :]
            if not EVEN_D:
                x_mask = x_mask & (start + offs_d < D)[None, :]
                w_mask = w_mask & (start + offs_d < D)[:, None]
            w = tl.load(w_at, mask=w_mask, other=0.0)
            x = tl.load(x_at, mask=x_mask, other=0.0)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
            if HAS_REF:
                r = tl.load(r_at, mask=x_mask, other=0.0)
                ref_acc = tl.dot(r, w, ref_acc, input_precision=PRECISION)
                r_at += BLOCK_D * stride_rd
            x_at += BLOCK_D * stride_hd
            w_at += BLOCK_D * stride_wd
    return acc, ref_acc


@triton.jit
def linear_logprob_fwd_kernel(
    hidden,  # (M, D), this and the next two descriptors with TMA
    ref_hidden,
    weight,  # (V, D)
    bias,  # (V,)
    targets,  # (M,) int64
    temperature,  # () float32
    sums,  # (num_splits, NUM_SUMS, M) float32
    saved,  # (M, V)
    ref_saved,
    M,
    V,
    D,
    stride_hm,
    stride_hd,
    stride_rm,
    stride_rd,
    stride_wv,
    stride_wd,
    softcap,
    ignore_index,
    split_size,  # columns of a split, a multiple of BLOCK_V
    HAS_REF: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SAVE: tl.constexpr,
    EVEN_D: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    num_rows, num_splits = tl.cdiv(M, BLOCK_M), tl.cdiv(V, split_size)
    row, split = tile_of(tl.program_id(0), num_rows, num_splits, GROUP)
    first_m = row * BLOCK_M
    offs_m = first_m.to(tl.int64) + tl.arange(0, BLOCK_M)
    inside_m = offs_m < M
    target = tl.load(targets + offs_m, mask=inside_m, other=ignore_index)
    keep = target != ignore_index  # a masked load reads nothing: NaN in such a row cannot enter
    column = tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)
    inv_temperature = 1.0 / tl.load(temperature)

    row_max = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    weighted = tl.zeros((BLOCK_M,), tl.float32)
    difference = tl.zeros((BLOCK_M,), tl.float32)
    target_z = tl.zeros((BLOCK_M,), tl.float32)
    ref_max = tl.full((BLOCK_M,), LOWEST, tl.float32)
    ref_total = tl.zeros((BLOCK_M,), tl.float32)
    ref_target_z = tl.zeros((BLOCK_M,), tl.float32)

    first = split * split_size
    # Flattened, the loads of the next block of columns are under way while this one is summed up.
    for start in tl.range(first, tl.minimum(first + split_size, V), BLOCK_V, flatten=TMA):
        offs_v = start + tl.arange(0, BLOCK_V)
        inside_v = offs_v < V
        acc, ref_acc = _products(
            hidden, ref_hidden, weight, first_m, offs_m, keep, start, offs_v, inside_v, D,
            stride_hm, stride_hd, stride_rm, stride_rd, stride_wv, stride_wd,
            HAS_REF, EVEN_D, TMA, PRECISION, BLOCK_M, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        if SAVE:
            at = offs_m[:, None] * V + offs_v[None, :]
            stored = inside_m[:, None] & inside_v[None, :]
            rounded = acc.to(saved.dtype.element_ty)
            tl.store(saved + at, rounded, mask=stored)
            acc = rounded.to(tl.float32)  # so that backward sees the same
            if HAS_REF:
                rounded = ref_acc.to(saved.dtype.element_ty)
                tl.store(ref_saved + at, rounded, mask=stored)
                ref_acc = rounded.to(tl.float32)
        z, _ = _logits(acc, bias, offs_v, inside_v, inv_temperature, softcap, HAS_BIAS, HAS_SOFTCAP)
        # Beyond V: the exponential is 0, and 0 times a finite number is 0.
        if TMA:
            if start + BLOCK_V > V:  # a branch costs plain loads registers they lack
                z = tl.where(inside_v[None, :], z, LOWEST)
        else:
            z = tl.where(inside_v[None, :], z, LOWEST)
        hit = offs_v[None, :] == column[:, None]
        target_z += tl.sum(tl.where(hit, z, 0.0), 1)
        new_max = tl.maximum(row_max, tl.max(z, 1))
        shift = row_max - new_max
        row_max = new_max
        factor = _exp(shift)
        below = z - new_max[:, None]
        e = _exp(below)
        weighted = factor * (weighted + shift * total) + tl.sum(e * below, 1)
        total = factor * total + tl.sum(e, 1)
        if HAS_REF:
            z_ref, _ = _logits(
                ref_acc, bias, offs_v, inside_v, inv_temperature, softcap, HAS_BIAS, HAS_SOFTCAP
            )
            z_ref = tl.where(inside_v[None, :], z_ref, LOWEST)
            difference = factor * difference + tl.sum(e * (z - z_ref), 1)
            ref_target_z += tl.sum(tl.where(hit, z_ref, 0.0), 1)
            new_max = tl.maximum(ref_max, tl.max(z_ref, 1))
            ref_total *= _exp(ref_max - new_max)
            ref_total += tl.sum(_exp(z_ref - new_max[:, None]), 1)
            ref_max = new_max

    at = sums + split.to(tl.int64) * NUM_SUMS * M + offs_m
    tl.store(at + MAX * M, row_max, mask=inside_m)
    tl.store(at + SUM * M, total, mask=inside_m)
    tl.store(at + WEIGHTED * M, weighted, mask=inside_m)
    tl.store(at + TARGET * M, target_z, mask=inside_m)
    if HAS_REF:
        tl.store(at + DIFFERENCE * M, difference, mask=inside_m)
        tl.store(at + REF_MAX * M, ref_max, mask=inside_m)
        tl.store(at + REF_SUM * M, ref_total, mask=inside_m)
        tl.store(at + REF_TARGET * M, ref_target_z, mask=inside_m)


@triton.jit
def linear_logprob_merge_kernel(
    sums,  # (num_splits, NUM_SUMS, M) float32
    targets,  # (M,) int64
    results,  # (5, M) float32: logprobs, entropy, logsumexp, ref_logprobs, kl
    norms,  # (4, M) float32: maximum and log of the sum, of both
    M,
    V,
    ignore_index,
    num_splits,
    HAS_REF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,  # num_splits or more
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = offs_m < M
    target = tl.load(targets + offs_m, mask=inside, other=ignore_index)
    keep = target != ignore_index
    # Of a split that is not there: nothing is added.
    offs_s = tl.arange(0, BLOCK_S)
    there = (offs_s < num_splits)[:, None] & inside[None, :]
    at = sums + offs_s[:, None].to(tl.int64) * NUM_SUMS * M + offs_m[None, :]
    maxima = tl.load(at + MAX * M, mask=there, other=LOWEST)
    totals = tl.load(at + SUM * M, mask=there, other=0.0)
    row_max = tl.max(maxima, 0)
    shift = maxima - row_max[None, :]
    factor = tl.exp(shift)
    total = tl.sum(factor * totals, 0)
    weighted = tl.load(at + WEIGHTED * M, mask=there, other=0.0) + shift * totals
    weighted = tl.sum(factor * weighted, 0)
    target_z = tl.sum(tl.load(at + TARGET * M, mask=there, other=0.0), 0)
    if HAS_REF:
        difference = tl.sum(factor * tl.load(at + DIFFERENCE * M, mask=there, other=0.0), 0)
        maxima = tl.load(at + REF_MAX * M, mask=there, other=LOWEST)
        ref_max = tl.max(maxima, 0)
        ref_total = tl.load(at + REF_SUM * M, mask=there, other=0.0)
        ref_total = tl.sum(tl.exp(maxima - ref_max[None, :]) * ref_total, 0)
        ref_target_z = tl.sum(tl.load(at + REF_TARGET * M, mask=there, other=0.0), 0)

    log_sum = tl.log(total)
    # The sum has a term of 1; the hardware's logarithm may still be a hair below 0 there.
    log_sum = tl.where(log_sum < 0.0, 0.0, log_sum)
    known = (target >= 0) & (target < V)
    nan = float("nan")
    logprob = tl.where(known, (target_z - row_max) - log_sum, nan)
    tl.store(results + offs_m, tl.where(keep, logprob, 0.0), mask=inside)
    entropy = log_sum - weighted / total
    tl.store(results + M + offs_m, tl.where(keep, entropy, 0.0), mask=inside)
    tl.store(results + 2 * M + offs_m, tl.where(keep, row_max + log_sum, 0.0), mask=inside)
    tl.store(norms + offs_m, tl.where(keep, row_max, 0.0), mask=inside)
    tl.store(norms + M + offs_m, tl.where(keep, log_sum, 0.0), mask=inside)
    if HAS_REF:
        ref_log_sum = tl.log(ref_total)
        ref_log_sum = tl.where(ref_log_sum < 0.0, 0.0, ref_log_sum)
        logprob = tl.where(known, (ref_target_z - ref_max) - ref_log_sum, nan)
        tl.store(results + 3 * M + offs_m, tl.where(keep, logprob, 0.0), mask=inside)
        kl = difference / total - ((row_max - ref_max) + (log_sum - ref_log_sum))
        kl = tl.where(kl < 0.0, 0.0, kl)  # below 0 by rounding only
        tl.store(results + 4 * M + offs_m, tl.where(keep, kl, 0.0), mask=inside)
        tl.store(norms + 2 * M + offs_m, tl.where(keep, ref_max, 0.0), mask=inside)
        tl.store(norms + 3 * M + offs_m, tl.where(keep, ref_log_sum, 0.0), mask=inside)


@triton.jit
def linear_logprob_dlogits_kernel(
    hidden,  # (M, D), this and the next two descriptors with TMA
    ref_hidden,
    weight,  # (V, D)
    bias,  # (V,)
    targets,  # (M,) int64
    temperature,  # () float32
    upstream,  # (4, M) float32: of logprobs, entropy, logsumexp, kl
    entropy,  # (M,) float32
    kl,  # (M,) float32
    norms,  # (4, M) float32
    saved,  # (M, V)
    ref_saved,
    dlogits,  # (M, chunk), a descriptor with TMA
    M,
    V,
    D,
    stride_hm,
    stride_hd,
    stride_rm,
    stride_rd,
    stride_wv,
    stride_wd,
    softcap,
    ignore_index,
    first,  # column of the chunk
    count,  # columns of it that there are
    chunk,
    HAS_REF: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SAVED: tl.constexpr,
    EVEN_D: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    row, col = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(count, BLOCK_V), GROUP)
    first_m, first_c = row * BLOCK_M, col * BLOCK_V
    offs_m = first_m.to(tl.int64) + tl.arange(0, BLOCK_M)
    inside_m = offs_m < M
    offs_c = first_c + tl.arange(0, BLOCK_V)
    offs_v = first + offs_c
    inside_v = offs_v < V
    target = tl.load(targets + offs_m, mask=inside_m, other=ignore_index)
    keep = target != ignore_index
    there = (target >= first) & (target < first + count)
    column = tl.where(there, target - first, -1).to(tl.int32)
    if SAVED:
        at = offs_m[:, None] * V + offs_v[None, :]
        stored = keep[:, None] & inside_v[None, :]
        acc = tl.load(saved + at, mask=stored, other=0.0).to(tl.float32)
        ref_acc = acc
        if HAS_REF:
            ref_acc = tl.load(ref_saved + at, mask=stored, other=0.0).to(tl.float32)
    else:
        acc, ref_acc = _products(
            hidden, ref_hidden, weight, first_m, offs_m, keep, first + first_c, offs_v, inside_v, D,
            stride_hm, stride_hd, stride_rm, stride_rd, stride_wv, stride_wd,
            HAS_REF, EVEN_D, TMA, PRECISION, BLOCK_M, BLOCK_V, BLOCK_D,
        )  # fmt: skip
    inv_temperature = 1.0 / tl.load(temperature)
    z, slope = _logits(acc, bias, offs_v, inside_v, inv_temperature, softcap, HAS_BIAS, HAS_SOFTCAP)
    # Without a softcap the slope is one number, which the row's own take.
    unit = 1.0 if HAS_SOFTCAP else inv_temperature
    dlogprob = tl.load(upstream + offs_m, mask=keep, other=0.0) * unit
    dentropy = tl.load(upstream + M + offs_m, mask=keep, other=0.0) * unit
    dlogsumexp = tl.load(upstream + 2 * M + offs_m, mask=keep, other=0.0) * unit
    row_max = tl.load(norms + offs_m, mask=keep, other=0.0)
    log_sum = tl.load(norms + M + offs_m, mask=keep, other=0.0)
    h = tl.load(entropy + offs_m, mask=keep, other=0.0)
    # Above 0 by rounding; by more beyond V, where dz is to be finite: dhidden adds 0 times it.
    logp = tl.minimum((z - row_max[:, None]) - log_sum[:, None], 0.0)
    base = dlogsumexp - dlogprob - dentropy * h
    factor = base[:, None] - dentropy[:, None] * logp
    if HAS_REF:
        z_ref, _ = _logits(
            ref_acc, bias, offs_v, inside_v, inv_temperature, softcap, HAS_BIAS, HAS_SOFTCAP
        )
        dkl = tl.load(upstream + 3 * M + offs_m, mask=keep, other=0.0) * unit
        offset = row_max - tl.load(norms + 2 * M + offs_m, mask=keep, other=0.0)
        offset += log_sum - tl.load(norms + 3 * M + offs_m, mask=keep, other=0.0)
        offset += tl.load(kl + offs_m, mask=keep, other=0.0)
        factor += dkl[:, None] * ((z - z_ref) - offset[:, None])
    dz = _exp(logp) * factor
    dz += tl.where(offs_c[None, :] == column[:, None], dlogprob[:, None], 0.0)
    if HAS_SOFTCAP:
        dz *= slope
    dz = tl.where(keep[:, None], dz, 0.0)
    if TMA:
        dlogits.store([first_m, first_c], dz.to(dlogits.dtype))
    else:
        at = dlogits + offs_m[:, None] * chunk + offs_c[None, :]
        stored = inside_m[:, None] & (offs_c < chunk)[None, :]
        tl.store(at, dz.to(dlogits.dtype.element_ty), mask=stored)


@triton.jit
def linear_logprob_dhidden_kernel(
    dlogits,  # (M, chunk), (M, count) as a descriptor with TMA
    weight,  # (V, D), a descriptor with TMA
    dhidden,  # (M, D) float32, to which the chunk's part is added
    M,
    D,
    stride_wv,
    stride_wd,
    first,  # column of the chunk
    count,  # columns of it that there are
    chunk,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr,
):
    row, col = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(D, BLOCK_D), GROUP)
    first_m, first_d = row * BLOCK_M, col * BLOCK_D
    offs_m = first_m.to(tl.int64) + tl.arange(0, BLOCK_M)
    offs_d = first_d + tl.arange(0, BLOCK_D)
    inside_m, inside_d = offs_m < M, offs_d < D
    at = dhidden + offs_m[:, None] * D + offs_d[None, :]
    inside = inside_m[:, None] & inside_d[None, :]
    # The sum goes on where the last chunk left it, as if the chunks were one.
    acc = tl.load(at, mask=inside, other=0.0)
    if TMA:
        for start in range(0, count, BLOCK_V):
            dz = dlogits.load([first_m, start])
            w = weight.load([first + start, first_d])
            acc = tl.dot(dz, w, acc, input_precision=PRECISION)
    else:
        offs_c = tl.arange(0, BLOCK_V)
        dz_at = dlogits + offs_m[:, None] * chunk + offs_c[None, :]
        w_at = weight + (first + offs_c).to(tl.int64)[:, None] * stride_wv
        w_at += offs_d[None, :].to(tl.int64) * stride_wd
        for start in range(0, count, BLOCK_V):
            there = start + offs_c < count
            # Not masked by columns, of which no multiple is known: that makes loads of one element.
            dz = tl.load(dz_at, mask=inside_m[:, None], other=0.0)
            w = tl.load(w_at, mask=there[:, None] & inside_d[None, :], other=0.0)
            acc = tl.dot(dz, w, acc, input_precision=PRECISION)
            dz_at += BLOCK_V
            w_at += BLOCK_V * stride_wv
    tl.store(at, acc, mask=inside)
