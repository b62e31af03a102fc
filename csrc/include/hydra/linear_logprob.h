// Statistics of one row of logits, gathered block by block, and their derivative.
//
// z = cap(product + bias) / temperature, cap(x) = softcap tanh(x / softcap). Of p = softmax(z) and
// the reference's q: logprob, entropy, log-sum-exp and KL(p || q) follow from sums that are merged
// as in Milakov and Gimelshein 2018, arXiv:1805.02867, alg. 3. All of them are kept relative to the
// maximum or, for KL, to the reference's logit: so a shift of all logits costs no digits, and equal
// policies give exactly 0.
#pragma once
#include <cmath>
#include <cstdint>

#include "hydra/fast_exp.h"
#include "hydra/host_device.h"

namespace hydra {

struct LogitScale {
  float inv_temperature;
  float softcap;  // 0: none
  float inv_softcap;
};

HYDRA_HOST_DEVICE LogitScale make_logit_scale(float temperature, float softcap) {
  return {1.0f / temperature, softcap, softcap > 0.0f ? 1.0f / softcap : 0.0f};
}

struct Logit {
  float z;
  float slope;  // dz / d product
};

template <bool kCapped>
HYDRA_HOST_DEVICE Logit make_logit(float x, LogitScale scale) {
  if (!kCapped) return {x * scale.inv_temperature, scale.inv_temperature};
  const float tanh = fast_tanh(x * scale.inv_softcap);
  return {
      tanh * scale.softcap * scale.inv_temperature, (1.0f - tanh * tanh) * scale.inv_temperature};
}

struct OnlineSoftmax {
  float max;
  float sum;         // of e = exp(z - max); 0 while nothing has been added
  float weighted;    // sum of e (z - max), for the entropy
  float difference;  // sum of e (z - z_ref), for KL
};

HYDRA_HOST_DEVICE OnlineSoftmax empty_softmax() {
  return {-INFINITY, 0.0f, 0.0f, 0.0f};
}

HYDRA_HOST_DEVICE OnlineSoftmax moved_to(OnlineSoftmax a, float max) {
  const float shift = a.max - max;
  const float factor = fast_exp(shift);
  return {max, factor * a.sum, factor * (a.weighted + shift * a.sum), factor * a.difference};
}

// Rounding depends on the order: merged in that of the vocabulary, the result is always the same.
HYDRA_HOST_DEVICE OnlineSoftmax merge(OnlineSoftmax a, OnlineSoftmax b) {
  if (a.sum == 0.0f) return b;
  if (b.sum == 0.0f) return a;
  const float max = a.max > b.max ? a.max : b.max;
  a = moved_to(a, max);
  b = moved_to(b, max);
  return {max, a.sum + b.sum, a.weighted + b.weighted, a.difference + b.difference};
}

struct RowNorm {
  float max;
  float log_sum;  // log-sum-exp less max: apart, they keep their digits where z is around 1e4
};

struct RowResult {
  float logprob, entropy, logsumexp, ref_logprob, kl;
};

HYDRA_HOST_DEVICE RowNorm norm_of(OnlineSoftmax s) {
  return {s.max, logf(s.sum)};
}

// log(sum exp z / sum exp z_ref)
HYDRA_HOST_DEVICE float norm_difference(RowNorm norm, RowNorm ref_norm) {
  return (norm.max - ref_norm.max) + (norm.log_sum - ref_norm.log_sum);
}

HYDRA_HOST_DEVICE RowResult finish_row(
    OnlineSoftmax s, RowNorm norm, float target, RowNorm ref_norm, float ref_target, bool has_ref) {
  const float inv_sum = 1.0f / s.sum;
  RowResult out;
  out.logprob = (target - norm.max) - norm.log_sum;
  out.entropy = norm.log_sum - s.weighted * inv_sum;
  out.logsumexp = norm.max + norm.log_sum;
  out.ref_logprob = has_ref ? (ref_target - ref_norm.max) - ref_norm.log_sum : 0.0f;
  const float kl = s.difference * inv_sum - norm_difference(norm, ref_norm);
  out.kl = has_ref ? (kl < 0.0f ? 0.0f : kl) : 0.0f;  // below 0 by rounding only
  return out;
}

// What the gradient of a row's logits needs, in
//   dz = p (constant + entropy (log p + H) + kl ((z - z_ref) - offset)) + logprob [v == target].
struct RowGrad {
  RowNorm norm;
  float target;    // upstream of logprob
  float constant;  // upstream of logsumexp less that of logprob
  float entropy;   // minus the upstream of entropy
  float entropy_offset;
  float kl;         // upstream of KL
  float kl_offset;  // log-sum-exp less the reference's, plus KL
};

HYDRA_HOST_DEVICE RowGrad make_row_grad(
    RowNorm norm, RowNorm ref_norm, float entropy, float kl, float dlogprob, float dentropy,
    float dlogsumexp, float dkl) {
  RowGrad g;
  g.norm = norm;
  g.target = dlogprob;
  g.constant = dlogsumexp - dlogprob;
  g.entropy = -dentropy;
  g.entropy_offset = entropy;
  g.kl = dkl;
  g.kl_offset = norm_difference(norm, ref_norm) + kl;
  return g;
}

template <bool kRef>
HYDRA_HOST_DEVICE float logit_grad(const RowGrad& g, float z, float z_ref) {
  const float logp = (z - g.norm.max) - g.norm.log_sum;
  float factor = g.constant + g.entropy * (logp + g.entropy_offset);
  if (kRef) factor += g.kl * ((z - z_ref) - g.kl_offset);
  return fast_exp(logp) * factor;
}

// Rows of the (kNumSums, M) array that the blocks of the vocabulary update.
enum LogprobSum {
  kMax,
  kSum,
  kWeighted,
  kDifference,
  kTarget,
  kRefMax,
  kRefSum,
  kRefTarget,
  kNumLogprobSums
};

// Rows of the (kNumNorms, M) array that backward needs.
enum LogprobNorm { kNormMax, kNormLogSum, kRefNormMax, kRefNormLogSum, kNumLogprobNorms };

}  // namespace hydra
