// Reductions of rows, rows taken from and put into others, and tokens drawn from rows of logits.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/replay_words.h"
#include "hydra/fast_exp.h"

namespace hydra::cpu::replaying {

// Sixteen sums side by side, so that the loop is SIMD without reordering one sum.
constexpr int kLanes = 16;

template <class F>
HYDRA_INLINE float sum_of(std::int64_t n, F value) {
  float sums[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) sums[l] += value(i + l);
  }
  float total = 0.0f;
  for (int l = 0; l < kLanes; ++l) total += sums[l];
  for (; i < n; ++i) total += value(i);
  return total;
}

HYDRA_INLINE float largest(const float* x, std::int64_t n) {
  float top[kLanes];
  for (int l = 0; l < kLanes; ++l) top[l] = x[0];
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) top[l] = x[i + l] > top[l] ? x[i + l] : top[l];
  }
  for (; i < n; ++i) top[0] = x[i] > top[0] ? x[i] : top[0];
  for (int l = 1; l < kLanes; ++l) top[0] = top[l] > top[0] ? top[l] : top[0];
  return top[0];
}

HYDRA_INLINE void softmax_row(const float* x, std::int64_t n, float* y) {
  const float top = largest(x, n);
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) y[i] = fast_exp(x[i] - top);
  const float share = 1.0f / sum_of(n, [=](std::int64_t i) { return y[i]; });
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) y[i] *= share;
}

template <std::int64_t kOp>
HYDRA_INLINE void run_rows(Words words, int thread, int threads) {
  const std::int64_t rows = words.next(), n = words.next();
  const float* x = words.address();
  const float* scale = words.address();
  const float* shift = words.address();
  float* y = words.address();
  const float eps = words.number();
  const Part part = part_of(rows, 1, thread, threads);
  for (std::int64_t row = part.first; row < part.last; ++row) {
    const float* in = x + row * n;
    if constexpr (kOp == kMean) {
      y[row] = sum_of(n, [=](std::int64_t i) { return in[i]; }) / static_cast<float>(n);
    } else if constexpr (kOp == kSum) {
      y[row] = sum_of(n, [=](std::int64_t i) { return in[i]; });
    } else if constexpr (kOp == kSoftmax) {
      softmax_row(in, n, y + row * n);
      // Safe: a row of -inf alone has no part in anything.
      if (eps != 0.0f && largest(in, n) == -std::numeric_limits<float>::infinity()) {
        std::fill(y + row * n, y + (row + 1) * n, 0.0f);
      }
    } else {
      float* out = y + row * n;
      const auto count = static_cast<float>(n);
      const float mean = sum_of(n, [=](std::int64_t i) { return in[i]; }) / count;
      const float var =
          sum_of(n, [=](std::int64_t i) { return (in[i] - mean) * (in[i] - mean); }) / count;
      const float factor = 1.0f / std::sqrt(var + eps);
      for (std::int64_t i = 0; i < n; ++i) {
        float value = (in[i] - mean) * factor;
        if (scale != nullptr) value *= scale[i];
        if (shift != nullptr) value += shift[i];
        out[i] = value;
      }
    }
  }
}

template <class T>
HYDRA_INLINE void gather_of(Words words, int thread, int threads, std::atomic<bool>& strayed) {
  const std::int64_t count = words.next(), width = words.next(), rows = words.next();
  const auto* ids = words.address<std::int64_t>();
  const T* from = words.address<T>();
  const std::int64_t stride = words.next();
  float* to = words.address();
  const Part part = part_of(count, 1, thread, threads);
  for (std::int64_t i = part.first; i < part.last; ++i) {
    if (ids[i] < 0 || ids[i] >= rows) {
      strayed.store(true, std::memory_order_relaxed);
      continue;
    }
    const T* row = from + ids[i] * stride;
    float* out = to + i * width;
#pragma omp simd
    for (std::int64_t j = 0; j < width; ++j) out[j] = widen(row[j]);
  }
}

HYDRA_INLINE void run_gather(Words words, int thread, int threads, std::atomic<bool>& strayed) {
  if (words.next() != 0) {
    gather_of<BFloat16>(words, thread, threads, strayed);
  } else {
    gather_of<float>(words, thread, threads, strayed);
  }
}

// An index of one dimension: of which values, as far apart, and of how many; -1 is the last.
struct Index {
  const std::int64_t* values;
  std::int64_t step, size;

  HYDRA_INLINE static Index read(Words& words) {
    Index index{};
    index.values = words.address<std::int64_t>();
    index.step = words.next();
    index.size = words.next();
    return index;
  }

  // Whether it is inside; moves `offset` there.
  HYDRA_INLINE bool add(std::int64_t n, std::int64_t& offset) const {
    if (values == nullptr) return true;
    const std::int64_t at = values[n] < 0 ? values[n] + size : values[n];
    offset += at * step;
    return at >= 0 && at < size;
  }
};

// to[first[i], second[i], ...] = from[i, ...]; the rest (3 dimensions) is copied.
template <class T>
HYDRA_INLINE void put_of(Words words, int thread, int threads, std::atomic<bool>& strayed) {
  const std::int64_t count = words.next();
  const Index first = Index::read(words), second = Index::read(words);
  std::int64_t sizes[3], st[3], sf[3];
  words.read(sizes);
  T* to = words.address<T>();
  words.read(st);
  const float* from = words.address();
  const std::int64_t step_from = words.next();
  words.read(sf);
  const Part part = part_of(count, 1, thread, threads);
  for (std::int64_t n = part.first; n < part.last; ++n) {
    std::int64_t offset = 0;
    const bool inside = first.add(n, offset);
    if (!second.add(n, offset) || !inside) {
      strayed.store(true, std::memory_order_relaxed);
      continue;
    }
    T* out = to + offset;
    const float* in = from + n * step_from;
    for (std::int64_t i = 0; i < sizes[0]; ++i) {
      for (std::int64_t j = 0; j < sizes[1]; ++j) {
        for (std::int64_t k = 0; k < sizes[2]; ++k) {
          narrow(in[i * sf[0] + j * sf[1] + k * sf[2]], out + i * st[0] + j * st[1] + k * st[2]);
        }
      }
    }
  }
}

HYDRA_INLINE void run_put(Words words, int thread, int threads, std::atomic<bool>& strayed) {
  if (words.next() != 0) {
    put_of<BFloat16>(words, thread, threads, strayed);
  } else {
    put_of<float>(words, thread, threads, strayed);
  }
}

// out[...] = from[...] with the coordinate of one dimension replaced by ids[...], 4 dimensions.
template <class T>
HYDRA_INLINE void pick_of(Words words, std::atomic<bool>& strayed) {
  std::int64_t sizes[4], so[4], sf[4], si[4];
  words.read(sizes);
  float* out = words.address();
  words.read(so);
  const T* from = words.address<T>();
  words.read(sf);  // 0 in the dimension that is replaced
  const auto* ids = words.address<std::int64_t>();
  words.read(si);
  const std::int64_t step = words.next(), size = words.next();
  for (std::int64_t i = 0; i < sizes[0]; ++i) {
    for (std::int64_t j = 0; j < sizes[1]; ++j) {
      for (std::int64_t k = 0; k < sizes[2]; ++k) {
        for (std::int64_t l = 0; l < sizes[3]; ++l) {
          std::int64_t at = ids[i * si[0] + j * si[1] + k * si[2] + l * si[3]];
          if (at < 0) at += size;
          if (at < 0 || at >= size) {
            strayed.store(true, std::memory_order_relaxed);
            continue;
          }
          const T& value = from[i * sf[0] + j * sf[1] + k * sf[2] + l * sf[3] + at * step];
          out[i * so[0] + j * so[1] + k * so[2] + l * so[3]] = widen(value);
        }
      }
    }
  }
}

HYDRA_INLINE void run_pick(Words words, std::atomic<bool>& strayed) {
  if (words.next() != 0) {
    pick_of<BFloat16>(words, strayed);
  } else {
    pick_of<float>(words, strayed);
  }
}

// The k largest of each row, largest first, and where they are; of equal ones the first.
HYDRA_INLINE void run_top_k(Words words) {
  const std::int64_t rows = words.next(), n = words.next(), k = words.next();
  const float* x = words.address();
  float* values = words.address();
  auto* ids = words.address<std::int64_t>();
  const auto larger = [](float a, float b) { return a > b || (a != a && b == b); };
  for (std::int64_t row = 0; row < rows; ++row, x += n, values += k, ids += k) {
    std::int64_t kept = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      if (kept == k && !larger(x[i], values[k - 1])) continue;
      std::int64_t at = kept < k ? kept++ : k - 1;
      for (; at > 0 && larger(x[i], values[at - 1]); --at) {
        values[at] = values[at - 1];
        ids[at] = ids[at - 1];
      }
      values[at] = x[i];
      ids[at] = i;
    }
  }
}

constexpr std::int64_t kBlock = 64;  // tokens whose probabilities are summed before they are walked

// The first token whose cumulative weight exceeds uniform * total; never one of weight 0.
HYDRA_INLINE std::int64_t invert(
    const float* weights, const float* blocks, std::int64_t n, float uniform, double total) {
  const double threshold = static_cast<double>(uniform) * total;
  double before = 0.0;
  std::int64_t block = 0, found = 0;
  for (; block * kBlock < n; ++block) {
    if (before + blocks[block] > threshold) break;
    before += blocks[block];
  }
  for (std::int64_t i = block * kBlock; i < n; ++i) {
    before += weights[i];
    if (before > threshold) return i;
  }
  // Rounding left the threshold above the sum: the last token that has any weight.
  for (std::int64_t i = 0; i < n; ++i) {
    if (weights[i] > 0.0f) found = i;
  }
  return found;
}

HYDRA_INLINE double sum_blocks(const float* weights, std::int64_t n, float* blocks) {
  double total = 0.0;
  for (std::int64_t i = 0; i * kBlock < n; ++i) {
    const float* from = weights + i * kBlock;
    blocks[i] = sum_of(std::min(kBlock, n - i * kBlock), [=](std::int64_t j) { return from[j]; });
    total += blocks[i];
  }
  return total;
}

// What may be drawn of weights whose largest is 1; the others become 0. As filter_logprobs of
// hydra_kernels/replay/draw.py.
struct Filter {
  std::int64_t top_k;
  float top_p, min_p;

  bool on(std::int64_t n) const { return (top_k > 0 && top_k < n) || top_p < 1.0f || min_p > 0.0f; }
};

inline void filter_weights(float* weights, std::int64_t n, const Filter& filter) {
  std::vector<float> order;
  const auto largest_first = [](float a, float b) { return a > b; };
  if (filter.top_k > 0 && filter.top_k < n) {
    order.assign(weights, weights + n);
    std::nth_element(order.begin(), order.begin() + (filter.top_k - 1), order.end(), largest_first);
    const float worst = order[static_cast<std::size_t>(filter.top_k - 1)];
    for (std::int64_t i = 0; i < n; ++i) weights[i] = weights[i] < worst ? 0.0f : weights[i];
  }
  if (filter.top_p < 1.0f) {
    order.assign(weights, weights + n);
    double total = 0.0;
    for (std::int64_t i = 0; i < n; ++i) total += weights[i];
    // A token stays while those before it hold less than top_p: sorted no further than that.
    const double needed = static_cast<double>(filter.top_p) * total;
    double before = 0.0;
    std::int64_t kept = 0;
    const auto more = [&] { return kept == 0 || before < needed; };  // the likeliest stays
    for (std::int64_t done = 0, part = kBlock; done < n && more(); part *= 4) {
      const std::int64_t end = std::min(n, done + part);
      if (end < n) {
        std::nth_element(order.begin() + done, order.begin() + end, order.end(), largest_first);
      }
      std::sort(order.begin() + done, order.begin() + end, largest_first);
      for (; kept < end && more(); ++kept) {
        before += order[static_cast<std::size_t>(kept)];
      }
      done = end;
    }
    const float least = order[static_cast<std::size_t>(kept - 1)];
    std::int64_t equal = kept;  // of the least, the first in the vocabulary stay
    for (std::int64_t i = 0; i < n; ++i) equal -= weights[i] > least ? 1 : 0;
    for (std::int64_t i = 0; i < n; ++i) {
      if (weights[i] < least || (weights[i] == least && equal-- <= 0)) weights[i] = 0.0f;
    }
  }
  if (filter.min_p > 0.0f) {
    for (std::int64_t i = 0; i < n; ++i) {
      weights[i] = weights[i] < filter.min_p ? 0.0f : weights[i];
    }
  }
}

HYDRA_INLINE void run_draw(
    Words words, int thread, int threads, std::vector<float>& scratch, std::atomic<bool>& strayed) {
  const std::int64_t rows = words.next(), n = words.next();
  const float* logits = words.address();
  const std::int64_t stride = words.next();
  const float* uniforms = words.address();
  const std::int64_t uniform_stride = words.next(), num_uniforms = words.next();
  const auto* columns = words.address<std::int64_t>();
  auto* tokens = words.address<std::int64_t>();
  float* logprobs = words.address();
  float* drawn_logprobs = words.address();
  const float temperature = words.number();
  const bool sample = words.next() != 0;
  Filter filter{};
  filter.top_k = words.next();
  filter.top_p = words.number();
  filter.min_p = words.number();
  const std::int64_t late_from = words.next(), num_late = words.next();
  const std::int64_t* late = words.at;
  const auto needed = static_cast<std::size_t>(n + n / kBlock + 1);
  if (scratch.size() < needed) scratch.resize(needed);
  float *weights = scratch.data(), *blocks = weights + n;
  const float factor = 1.0f / temperature;
  const Part part = part_of(rows, 1, thread, threads);
  for (std::int64_t row = part.first; row < part.last; ++row) {
    if (sample && (columns[row] < 0 || columns[row] >= num_uniforms)) {
      strayed.store(true, std::memory_order_relaxed);
      continue;
    }
    const float* z = logits + row * stride;
    const float top = largest(z, n);
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) weights[i] = fast_exp((z[i] - top) * factor);
    const double total = sum_blocks(weights, n, blocks);
    float drawn_top = top;
    double drawn = total;
    if (columns[row] < late_from && num_late > 0) {
      std::memcpy(weights, z, static_cast<std::size_t>(n) * sizeof(float));
      for (std::int64_t i = 0; i < num_late; ++i) {
        weights[late[i]] = -std::numeric_limits<float>::infinity();
      }
      z = weights;
      drawn_top = largest(z, n);
    }
    std::int64_t token = 0;
    if (!sample) {
      while (token < n - 1 && !(z[token] >= drawn_top)) ++token;
    }
    if (z == weights) {
#pragma omp simd
      for (std::int64_t i = 0; i < n; ++i) weights[i] = fast_exp((weights[i] - drawn_top) * factor);
      drawn = sum_blocks(weights, n, blocks);
    }
    if (filter.on(n)) {
      filter_weights(weights, n, filter);
      drawn = sum_blocks(weights, n, blocks);
    }
    if (sample) {
      token = invert(weights, blocks, n, uniforms[row * uniform_stride + columns[row]], drawn);
    }
    const float score = logits[row * stride + token];
    tokens[row] = token;
    logprobs[row] = (score - top) * factor - static_cast<float>(std::log(total));
    drawn_logprobs[row] = (score - drawn_top) * factor - static_cast<float>(std::log(drawn));
  }
}

}  // namespace hydra::cpu::replaying
