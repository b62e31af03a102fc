"""The kernels of ``linear_logprob``: what they compute is told in linear_logprob.py, which launches
them."""

from __future__ import annotations

import triton
import triton.language as tl

from hydra_kernels.backends.triton.tiles import tile_of

# Rows of the partial sums; the second half where there is a reference.
MAX, SUM, WEIGHTED, TARGET, DIFFERENCE, REF_MAX, REF_SUM, REF_TARGET = map(tl.constexpr, range(8))
LOWEST = tl.constexpr(-1.0e38)  # finite: it may be subtracted from itself
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


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
def capped_logits(
    products, bias, offs_v, inside_v, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr
):
    """Logits before the temperature, and their slope d logit / d product."""
    if HAS_BIAS:
        products += tl.load(bias + offs_v, mask=inside_v, other=0.0).to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        tanh = _tanh(products / softcap)
        return tanh * softcap, 1.0 - tanh * tanh
    else:
        return products, 1.0


@triton.jit
def add_block(
    y, ref_acc, bias, offs_v, inside_v, column, scale, softcap,
    row_max, total, weighted, difference, target_y, ref_max, ref_total, ref_target_y,
    HAS_REF: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The statistics of rows with a block of logits added, y before the temperature.

    An element costs a comparison for the maximum, a difference and a product below it, the
    exponential, and an addition for each sum: so the temperature waits for the row's own numbers.
    What is beyond V holds LOWEST: its exponential is 0, and 0 times a finite number is 0.
    """
    hit = offs_v[None, :] == column[:, None]
    target_y += tl.sum(tl.where(hit, y, 0.0), 1)
    new_max = tl.maximum(row_max, tl.max(y, 1))
    shift = row_max - new_max
    factor = tl.exp2(shift * scale)
    below = y - new_max[:, None]
    e = tl.exp2(below * scale)
    weighted = factor * (weighted + shift * total) + tl.sum(e * below, 1)
    total = factor * total + tl.sum(e, 1)
    if HAS_REF:  # not before: its registers are short
        y_ref, _ = capped_logits(ref_acc, bias, offs_v, inside_v, softcap, HAS_BIAS, HAS_SOFTCAP)
        y_ref = tl.where(inside_v[None, :], y_ref, LOWEST)
        difference = factor * difference + tl.sum(e * (y - y_ref), 1)
        ref_target_y += tl.sum(tl.where(hit, y_ref, 0.0), 1)
        new_ref_max = tl.maximum(ref_max, tl.max(y_ref, 1))
        factor = tl.exp2((ref_max - new_ref_max) * scale)
        e = tl.exp2((y_ref - new_ref_max[:, None]) * scale)
        ref_total = factor * ref_total + tl.sum(e, 1)
        ref_max = new_ref_max
    return new_max, total, weighted, difference, target_y, ref_max, ref_total, ref_target_y


@triton.jit
def store_sums(
    sums, split, M, offs_m, inside_m,
    row_max, total, weighted, difference, target_y, ref_max, ref_total, ref_target_y,
    HAS_REF: tl.constexpr,
):  # fmt: skip
    at = sums + split.to(tl.int64) * (8 if HAS_REF else 4) * M + offs_m
    tl.store(at + MAX * M, row_max, mask=inside_m)
    tl.store(at + SUM * M, total, mask=inside_m)
    tl.store(at + WEIGHTED * M, weighted, mask=inside_m)
    tl.store(at + TARGET * M, target_y, mask=inside_m)
    if HAS_REF:
        tl.store(at + DIFFERENCE * M, difference, mask=inside_m)
        tl.store(at + REF_MAX * M, ref_max, mask=inside_m)
        tl.store(at + REF_SUM * M, ref_total, mask=inside_m)
        tl.store(at + REF_TARGET * M, ref_target_y, mask=inside_m)


@triton.jit
def _products(
    hidden, ref_hidden, weight, offs_m, keep, offs_v, inside_v, D,
    stride_hm, stride_hd, stride_rm, stride_rd, stride_wv, stride_wd,
    HAS_REF: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """hidden W^T and ref_hidden W^T, (BLOCK_M, BLOCK_V) float32 each, with one read of W."""
    acc = tl.zeros((BLOCK_M, BLOCK_V), dtype=tl.float32)
    ref_acc = tl.zeros((BLOCK_M, BLOCK_V), dtype=tl.float32)
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
    hidden,  # (M, D)
    ref_hidden,
    weight,  # (V, D)
    bias,  # (V,)
    targets,  # (M,) int64
    temperature,  # () float32
    sums,  # (num_splits, 4 or 8, M) float32
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
    EVEN_V: tl.constexpr,  # V is a multiple of BLOCK_V
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    num_rows, num_splits = tl.cdiv(M, BLOCK_M), tl.cdiv(V, split_size)
    row, split = tile_of(tl.program_id(0), num_rows, num_splits, GROUP)
    offs_m = (row * BLOCK_M).to(tl.int64) + tl.arange(0, BLOCK_M)
    inside_m = offs_m < M
    target = tl.load(targets + offs_m, mask=inside_m, other=ignore_index)
    keep = target != ignore_index  # a masked load reads nothing: NaN in such a row cannot enter
    column = tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)
    scale = 1.0 / tl.load(temperature) * LOG2E

    row_max = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    weighted = tl.zeros((BLOCK_M,), tl.float32)
    difference = tl.zeros((BLOCK_M,), tl.float32)
    target_y = tl.zeros((BLOCK_M,), tl.float32)
    ref_max = tl.full((BLOCK_M,), LOWEST, tl.float32)
    ref_total = tl.zeros((BLOCK_M,), tl.float32)
    ref_target_y = tl.zeros((BLOCK_M,), tl.float32)

    first = split * split_size
    for start in range(first, tl.minimum(first + split_size, V), BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        inside_v = offs_v < V
        if EVEN_V:
            inside_v = tl.full((BLOCK_V,), 1, tl.int1)
        acc, ref_acc = _products(
            hidden, ref_hidden, weight, offs_m, keep, offs_v, inside_v, D,
            stride_hm, stride_hd, stride_rm, stride_rd, stride_wv, stride_wd,
            HAS_REF, EVEN_D, PRECISION, BLOCK_M, BLOCK_V, BLOCK_D,
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
        y, _ = capped_logits(acc, bias, offs_v, inside_v, softcap, HAS_BIAS, HAS_SOFTCAP)
        y = tl.where(inside_v[None, :], y, LOWEST)
        row_max, total, weighted, difference, target_y, ref_max, ref_total, ref_target_y = (
            add_block(
                y, ref_acc, bias, offs_v, inside_v, column, scale, softcap,
                row_max, total, weighted, difference, target_y, ref_max, ref_total, ref_target_y,
                HAS_REF, HAS_BIAS, HAS_SOFTCAP,
            )
        )  # fmt: skip

    store_sums(
        sums, split, M, offs_m, inside_m,
        row_max, total, weighted, difference, target_y, ref_max, ref_total, ref_target_y,
        HAS_REF,
    )  # fmt: skip


@triton.jit
def linear_logprob_merge_kernel(
    sums,  # (num_splits, 4 or 8, M) float32
    targets,  # (M,) int64
    temperature,  # () float32
    results,  # (5, M) float32: logprobs, entropy, logsumexp, ref_logprobs, kl
    norms,  # (4, M) float32: maximum, before the temperature, and log of the sum, of both
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
    inv_temperature = 1.0 / tl.load(temperature)
    scale = 1.0 / tl.load(temperature) * LOG2E
    # Of a split that is not there: nothing is added.
    offs_s = tl.arange(0, BLOCK_S)
    there = (offs_s < num_splits)[:, None] & inside[None, :]
    at = sums + offs_s[:, None].to(tl.int64) * (8 if HAS_REF else 4) * M + offs_m[None, :]
    maxima = tl.load(at + MAX * M, mask=there, other=LOWEST)
    totals = tl.load(at + SUM * M, mask=there, other=0.0)
    row_max = tl.max(maxima, 0)
    shift = maxima - row_max[None, :]
    factor = tl.exp2(shift * scale)
    total = tl.sum(factor * totals, 0)
    weighted = tl.load(at + WEIGHTED * M, mask=there, other=0.0) + shift * totals
    weighted = tl.sum(factor * weighted, 0)
    target_y = tl.sum(tl.load(at + TARGET * M, mask=there, other=0.0), 0)
    if HAS_REF:
        difference = tl.sum(factor * tl.load(at + DIFFERENCE * M, mask=there, other=0.0), 0)
        maxima = tl.load(at + REF_MAX * M, mask=there, other=LOWEST)
        ref_max = tl.max(maxima, 0)
        ref_total = tl.load(at + REF_SUM * M, mask=there, other=0.0)
        ref_total = tl.sum(tl.exp2((maxima - ref_max[None, :]) * scale) * ref_total, 0)
        ref_target_y = tl.sum(tl.load(at + REF_TARGET * M, mask=there, other=0.0), 0)

    log_sum = tl.log(total)
    # The sum has a term of 1; the hardware's logarithm may still be a hair below 0 there.
    log_sum = tl.where(log_sum < 0.0, 0.0, log_sum)
    known = (target >= 0) & (target < V)
    nan = float("nan")
    logprob = tl.where(known, (target_y - row_max) * inv_temperature - log_sum, nan)
    tl.store(results + offs_m, tl.where(keep, logprob, 0.0), mask=inside)
    entropy = log_sum - weighted / total * inv_temperature
    tl.store(results + M + offs_m, tl.where(keep, entropy, 0.0), mask=inside)
    tl.store(
        results + 2 * M + offs_m,
        tl.where(keep, row_max * inv_temperature + log_sum, 0.0),
        mask=inside,
    )
    tl.store(norms + offs_m, tl.where(keep, row_max, 0.0), mask=inside)
    tl.store(norms + M + offs_m, tl.where(keep, log_sum, 0.0), mask=inside)
    if HAS_REF:
        ref_log_sum = tl.log(ref_total)
        ref_log_sum = tl.where(ref_log_sum < 0.0, 0.0, ref_log_sum)
        logprob = (ref_target_y - ref_max) * inv_temperature - ref_log_sum
        logprob = tl.where(known, logprob, nan)
        tl.store(results + 3 * M + offs_m, tl.where(keep, logprob, 0.0), mask=inside)
        kl = (difference / total - (row_max - ref_max)) * inv_temperature
        kl = kl - (log_sum - ref_log_sum)
        kl = tl.where(kl < 0.0, 0.0, kl)  # below 0 by rounding only
        tl.store(results + 4 * M + offs_m, tl.where(keep, kl, 0.0), mask=inside)
        tl.store(norms + 2 * M + offs_m, tl.where(keep, ref_max, 0.0), mask=inside)
        tl.store(norms + 3 * M + offs_m, tl.where(keep, ref_log_sum, 0.0), mask=inside)


@triton.jit
def gradient_of(
    acc, ref_acc, bias, temperature, upstream, entropy, kl, norms,
    M, offs_m, target, keep, first, count, offs_c, offs_v, inside_v, softcap,
    HAS_REF: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """dz of a block of logits, of the columns ``offs_c`` of a chunk: 0 in rows that do not count.

    What is of a row is put together first; an element takes a difference, the logarithm of its
    probability, an exponential, and a product with a straight line in that logarithm.
    """
    there = (target >= first) & (target < first + count)
    column = tl.where(there, target - first, -1).to(tl.int32)
    inv_temperature = 1.0 / tl.load(temperature)
    y, slope = capped_logits(acc, bias, offs_v, inside_v, softcap, HAS_BIAS, HAS_SOFTCAP)
    dlogprob = tl.load(upstream + offs_m, mask=keep, other=0.0) * inv_temperature
    dentropy = tl.load(upstream + M + offs_m, mask=keep, other=0.0) * inv_temperature
    dlogsumexp = tl.load(upstream + 2 * M + offs_m, mask=keep, other=0.0) * inv_temperature
    row_max = tl.load(norms + offs_m, mask=keep, other=0.0)
    log_sum = tl.load(norms + M + offs_m, mask=keep, other=0.0)
    h = tl.load(entropy + offs_m, mask=keep, other=0.0)
    # In units of log 2. Above 0 by rounding; by more beyond V, where dz is to be finite: dhidden
    # adds 0 times it.
    log2p = (y - row_max[:, None]) * (inv_temperature * LOG2E) - (log_sum * LOG2E)[:, None]
    log2p = tl.minimum(log2p, 0.0)
    base = dlogsumexp - dlogprob - dentropy * h
    factor = base[:, None] - (dentropy * LN2)[:, None] * log2p
    if HAS_REF:
        y_ref, _ = capped_logits(ref_acc, bias, offs_v, inside_v, softcap, HAS_BIAS, HAS_SOFTCAP)
        dkl = tl.load(upstream + 3 * M + offs_m, mask=keep, other=0.0) * inv_temperature
        offset = row_max - tl.load(norms + 2 * M + offs_m, mask=keep, other=0.0)
        offset = offset * inv_temperature
        offset += log_sum - tl.load(norms + 3 * M + offs_m, mask=keep, other=0.0)
        offset += tl.load(kl + offs_m, mask=keep, other=0.0)
        factor += dkl[:, None] * ((y - y_ref) * inv_temperature - offset[:, None])
    dz = tl.exp2(log2p) * factor
    dz += tl.where(offs_c[None, :] == column[:, None], dlogprob[:, None], 0.0)
    if HAS_SOFTCAP:
        dz *= slope
    return tl.where(keep[:, None], dz, 0.0)


@triton.jit
def linear_logprob_dlogits_kernel(
    hidden,  # (M, D)
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
    dlogits,  # (M, chunk)
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
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    row, col = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(count, BLOCK_V), GROUP)
    offs_m = (row * BLOCK_M).to(tl.int64) + tl.arange(0, BLOCK_M)
    inside_m = offs_m < M
    offs_c = col * BLOCK_V + tl.arange(0, BLOCK_V)
    offs_v = first + offs_c
    inside_v = offs_v < V
    target = tl.load(targets + offs_m, mask=inside_m, other=ignore_index)
    keep = target != ignore_index
    if SAVED:
        at = offs_m[:, None] * V + offs_v[None, :]
        stored = keep[:, None] & inside_v[None, :]
        acc = tl.load(saved + at, mask=stored, other=0.0).to(tl.float32)
        ref_acc = acc
        if HAS_REF:
            ref_acc = tl.load(ref_saved + at, mask=stored, other=0.0).to(tl.float32)
    else:
        acc, ref_acc = _products(
            hidden, ref_hidden, weight, offs_m, keep, offs_v, inside_v, D,
            stride_hm, stride_hd, stride_rm, stride_rd, stride_wv, stride_wd,
            HAS_REF, EVEN_D, PRECISION, BLOCK_M, BLOCK_V, BLOCK_D,
        )  # fmt: skip
    dz = gradient_of(
        acc, ref_acc, bias, temperature, upstream, entropy, kl, norms,
        M, offs_m, target, keep, first, count, offs_c, offs_v, inside_v, softcap,
        HAS_REF, HAS_BIAS, HAS_SOFTCAP,
    )  # fmt: skip
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
