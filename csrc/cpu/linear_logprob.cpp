// What linear_logprob does with a block of logits: add it to the statistics of its rows, or make
// the gradient of it. The products before and after are BLAS's.
#include "hydra/linear_logprob.h"

#include <algorithm>
#include <cstdint>

#include "cpu/blas.h"
#include "cpu/entries.h"
#include "cpu/floats.h"
#include "cpu/multiversion.h"
#include "hydra/pointer.h"

namespace hydra::cpu {
namespace {

// Columns taken at once: three such buffers and the row itself fit into a first-level cache. It is
// a constant, so that a row's rounding does not depend on how the blocks are chosen for a batch.
constexpr std::int64_t kChunk = 2048;
// Below this many logits a parallel region costs more than it saves.
constexpr std::int64_t kParallelLogits = 16384;

struct Head {
  const float* bias;  // of the block's first column; null: none
  LogitScale scale;
};

inline bool is_identity(const Head& head) {
  return head.bias == nullptr && head.scale.softcap == 0.0f && head.scale.inv_temperature == 1.0f;
}

// z, and dz / d product where slope is given, of `count` products.
inline void make_logits(
    const float* product, std::int64_t count, Head head, float* z, float* slope) {
  const float* bias = head.bias;
  const LogitScale scale = head.scale;
  if (scale.softcap > 0.0f) {
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) {
      const float x = bias != nullptr ? product[i] + bias[i] : product[i];
      const Logit logit = make_logit<true>(x, scale);
      z[i] = logit.z;
      if (slope != nullptr) slope[i] = logit.slope;
    }
  } else {
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) {
      const float x = bias != nullptr ? product[i] + bias[i] : product[i];
      z[i] = make_logit<false>(x, scale).z;
    }
  }
}

inline float largest(const float* z, std::int64_t count) {
  float max = -INFINITY;
#pragma omp simd reduction(max : max)
  for (std::int64_t i = 0; i < count; ++i) max = z[i] > max ? z[i] : max;
  return max;
}

template <bool kRef>
inline OnlineSoftmax sums_of(const float* z, const float* z_ref, std::int64_t count) {
  const float max = largest(z, count);
  float sum = 0.0f, weighted = 0.0f, difference = 0.0f;
#pragma omp simd reduction(+ : sum, weighted, difference)
  for (std::int64_t i = 0; i < count; ++i) {
    const float below = z[i] - max;
    const float e = fast_exp(below);
    sum += e;
    weighted += e * below;
    if (kRef) difference += e * (z[i] - z_ref[i]);
  }
  return {max, sum, weighted, difference};
}

inline OnlineSoftmax ref_sums_of(const float* z, std::int64_t count) {
  const float max = largest(z, count);
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < count; ++i) sum += fast_exp(z[i] - max);
  return {max, sum, 0.0f, 0.0f};
}

struct Pair {
  OnlineSoftmax actor, ref;
};

}  // namespace

void linear_logprob_product(
    std::uintptr_t a_, std::int64_t a_stride, bool a_transposed, std::uintptr_t b_,
    std::int64_t b_stride, bool b_transposed, std::int64_t m, std::int64_t n, std::int64_t k,
    std::int64_t piece, bool adds, std::uintptr_t out_, std::int64_t out_stride) {
  const auto *a = pointer<const std::uint16_t>(a_), *b = pointer<const std::uint16_t>(b_);
  auto* out = pointer<float>(out_);
  for (std::int64_t begin = 0; begin < k; begin += piece) {
    const std::int64_t count = std::min(piece, k - begin);
    const float one = 1.0f, beta = adds || begin > 0 ? 1.0f : 0.0f;
    // Columns first, as Fortran has it: out^T = op(b)^T op(a)^T.
    gemm_bf16_entry()(
        b_transposed ? "T" : "N", a_transposed ? "T" : "N", &n, &m, &count, &one,
        b + begin * (b_transposed ? 1 : b_stride), &b_stride,
        a + begin * (a_transposed ? a_stride : 1), &a_stride, &beta, out, &out_stride);
  }
}

void linear_logprob_sums(
    std::uintptr_t products_, std::uintptr_t ref_products_, std::int64_t row_stride,
    std::int64_t num_rows, std::int64_t first_column, std::int64_t num_columns,
    std::uintptr_t bias_, std::uintptr_t temperature, float softcap, std::uintptr_t targets_,
    std::uintptr_t sums_, std::int64_t sums_stride) {
  const auto* products = pointer<const float>(products_);
  const auto* ref_products = pointer<const float>(ref_products_);
  const auto* bias = pointer<const float>(bias_);
  const auto* targets = pointer<const std::int64_t>(targets_);
  auto* sums = pointer<float>(sums_);
  const LogitScale scale = make_logit_scale(*pointer<const float>(temperature), softcap);
  const Head whole{bias == nullptr ? nullptr : bias + first_column, scale};
  const bool plain = is_identity(whole), has_ref = ref_products != nullptr;

#pragma omp parallel for schedule(static) if (num_rows * num_columns >= kParallelLogits)
  for (std::int64_t row = 0; row < num_rows; ++row) {
    alignas(64) float z_buffer[kChunk], z_ref_buffer[kChunk];
    float* state = sums + row;
    const std::int64_t stride = sums_stride, target = targets[row] - first_column;
    OnlineSoftmax actor = empty_softmax(), ref = empty_softmax();
    float target_logit = NAN, ref_target_logit = NAN;  // stays where the target is no token
    if (first_column > 0) {
      actor = {
          state[kMax * stride], state[kSum * stride], state[kWeighted * stride],
          state[kDifference * stride]};
      target_logit = state[kTarget * stride];
      if (has_ref) {
        ref = {state[kRefMax * stride], state[kRefSum * stride], 0.0f, 0.0f};
        ref_target_logit = state[kRefTarget * stride];
      }
    }
    for (std::int64_t begin = 0; begin < num_columns; begin += kChunk) {
      const std::int64_t count = std::min(kChunk, num_columns - begin);
      const Head head{whole.bias == nullptr ? nullptr : whole.bias + begin, scale};
      const float* product = products + row * row_stride + begin;
      const float* ref_product = has_ref ? ref_products + row * row_stride + begin : nullptr;
      float *z_out = z_buffer, *z_ref_out = z_ref_buffer;
      const Pair chunk = multiversion([=] {
        const float *z = product, *z_ref = ref_product;
        if (!plain) {
          make_logits(product, count, head, z_out, nullptr);
          z = z_out;
          if (has_ref) make_logits(ref_product, count, head, z_ref_out, nullptr);
          z_ref = z_ref_out;
        }
        if (!has_ref) return Pair{sums_of<false>(z, nullptr, count), empty_softmax()};
        return Pair{sums_of<true>(z, z_ref, count), ref_sums_of(z_ref, count)};
      });
      actor = merge(actor, chunk.actor);
      if (has_ref) ref = merge(ref, chunk.ref);
      const std::int64_t at = target - begin;
      if (at >= 0 && at < count) {
        target_logit = plain ? product[at] : z_buffer[at];
        if (has_ref) ref_target_logit = plain ? ref_product[at] : z_ref_buffer[at];
      }
    }
    state[kMax * stride] = actor.max;
    state[kSum * stride] = actor.sum;
    state[kWeighted * stride] = actor.weighted;
    state[kDifference * stride] = actor.difference;
    state[kTarget * stride] = target_logit;
    if (has_ref) {
      state[kRefMax * stride] = ref.max;
      state[kRefSum * stride] = ref.sum;
      state[kRefTarget * stride] = ref_target_logit;
    }
  }
}

void linear_logprob_finish(
    std::uintptr_t sums_, std::int64_t num_rows, bool has_ref, std::uintptr_t results_,
    std::uintptr_t norms_) {
  const auto* sums = pointer<const float>(sums_);
  auto *results = pointer<float>(results_), *norms = pointer<float>(norms_);
  for (std::int64_t row = 0; row < num_rows; ++row) {
    const auto at = [=](LogprobSum which) { return sums[which * num_rows + row]; };
    const OnlineSoftmax actor{at(kMax), at(kSum), at(kWeighted), at(kDifference)};
    const RowNorm norm = norm_of(actor);
    RowNorm ref_norm{0.0f, 0.0f};
    if (has_ref) ref_norm = norm_of({at(kRefMax), at(kRefSum), 0.0f, 0.0f});
    const float ref_target = has_ref ? at(kRefTarget) : 0.0f;
    const RowResult out = finish_row(actor, norm, at(kTarget), ref_norm, ref_target, has_ref);
    results[0 * num_rows + row] = out.logprob;
    results[1 * num_rows + row] = out.entropy;
    results[2 * num_rows + row] = out.logsumexp;
    norms[kNormMax * num_rows + row] = norm.max;
    norms[kNormLogSum * num_rows + row] = norm.log_sum;
    norms[kRefNormMax * num_rows + row] = ref_norm.max;
    norms[kRefNormLogSum * num_rows + row] = ref_norm.log_sum;
    if (!has_ref) continue;
    results[3 * num_rows + row] = out.ref_logprob;
    results[4 * num_rows + row] = out.kl;
  }
}

void linear_logprob_grads(
    std::uintptr_t products_, std::uintptr_t ref_products_, std::int64_t row_stride,
    std::int64_t num_rows, std::int64_t first_column, std::int64_t num_columns,
    std::uintptr_t bias_, std::uintptr_t temperature, float softcap, std::uintptr_t targets_,
    std::uintptr_t norms_, std::uintptr_t entropy_, std::uintptr_t kl_, std::uintptr_t upstream_,
    std::int64_t stride, std::uintptr_t dlogits, bool is_bf16, std::int64_t dlogits_stride) {
  const auto* products = pointer<const float>(products_);
  const auto* ref_products = pointer<const float>(ref_products_);
  const auto* bias = pointer<const float>(bias_);
  const auto* targets = pointer<const std::int64_t>(targets_);
  const auto* norms = pointer<const float>(norms_);
  const auto *entropy = pointer<const float>(entropy_), *kl = pointer<const float>(kl_);
  const auto* upstream = pointer<const float>(upstream_);  // (4, stride)
  const LogitScale scale = make_logit_scale(*pointer<const float>(temperature), softcap);
  const Head whole{bias == nullptr ? nullptr : bias + first_column, scale};
  const bool plain = is_identity(whole), has_ref = ref_products != nullptr;

#pragma omp parallel for schedule(static) if (num_rows * num_columns >= kParallelLogits)
  for (std::int64_t row = 0; row < num_rows; ++row) {
    alignas(64) float z_buffer[kChunk], z_ref_buffer[kChunk], slope_buffer[kChunk];
    alignas(64) float dz_buffer[kChunk];
    const RowNorm norm{norms[kNormMax * stride + row], norms[kNormLogSum * stride + row]};
    RowNorm ref_norm = norm;
    if (has_ref)
      ref_norm = {norms[kRefNormMax * stride + row], norms[kRefNormLogSum * stride + row]};
    const RowGrad g = make_row_grad(
        norm, ref_norm, entropy[row], has_ref ? kl[row] : 0.0f, upstream[row],
        upstream[stride + row], upstream[2 * stride + row], upstream[3 * stride + row]);
    const std::int64_t target = targets[row] - first_column;
    for (std::int64_t begin = 0; begin < num_columns; begin += kChunk) {
      const std::int64_t count = std::min(kChunk, num_columns - begin);
      const Head head{whole.bias == nullptr ? nullptr : whole.bias + begin, scale};
      const float* product = products + row * row_stride + begin;
      const float* ref_product = has_ref ? ref_products + row * row_stride + begin : nullptr;
      float *z_out = z_buffer, *z_ref_out = z_ref_buffer, *slope_out = slope_buffer;
      const std::int64_t at = target - begin, to = row * dlogits_stride + begin;
      const bool here = at >= 0 && at < count;
      // A row's bfloat16s are written behind where its logits are still to be read.
      BFloat16* halves = is_bf16 ? pointer<BFloat16>(dlogits) + to : nullptr;
      float* dz = is_bf16 ? dz_buffer : pointer<float>(dlogits) + to;
      multiversion([=] {
        const float *z = product, *z_ref = ref_product;
        if (!plain) {
          make_logits(product, count, head, z_out, slope_out);
          z = z_out;
          if (has_ref) make_logits(ref_product, count, head, z_ref_out, nullptr);
          z_ref = z_ref_out;
        }
        if (has_ref) {
#pragma omp simd
          for (std::int64_t i = 0; i < count; ++i) {
            dz[i] = logit_grad<true>(g, z[i], z_ref[i]);
          }
        } else {
#pragma omp simd
          for (std::int64_t i = 0; i < count; ++i) dz[i] = logit_grad<false>(g, z[i], 0.0f);
        }
        if (here) dz[at] += g.target;
        if (scale.softcap > 0.0f) {
#pragma omp simd
          for (std::int64_t i = 0; i < count; ++i) dz[i] *= slope_out[i];
        } else if (scale.inv_temperature != 1.0f) {
#pragma omp simd
          for (std::int64_t i = 0; i < count; ++i) dz[i] *= scale.inv_temperature;
        }
        if (halves != nullptr) {
#pragma omp simd
          for (std::int64_t i = 0; i < count; ++i) narrow(dz[i], halves + i);
        }
        return 0;
      });
    }
  }
}

}  // namespace hydra::cpu
