// Scratch memory of one call, kept by the thread for its next.
//
// Fresh pages are zeroed by the kernel at a fifth of a microsecond a kilobyte, which for a LoRA
// layer is as long as its products take.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

namespace hydra::cpu {

struct FreeAligned {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
using Buffer = std::unique_ptr<float[], FreeAligned>;

inline Buffer make_buffer(std::int64_t n) {
  const std::size_t bytes = static_cast<std::size_t>(std::max<std::int64_t>(n, 1)) * sizeof(float);
  return Buffer(static_cast<float*>(::operator new[](bytes, std::align_val_t(64))));
}

class Arena {
 public:
  // What was taken before is free again.
  void start() {
    if (!extra_.empty()) {
      extra_.clear();
      const std::int64_t size = std::min(taken_, kKept);
      if (size > size_) {
        memory_.reset();
        memory_ = make_buffer(size);
        size_ = size;
      }
    }
    used_ = taken_ = 0;
  }

  // n floats, not initialised, until the next start().
  float* take(std::int64_t n) {
    n = (std::max<std::int64_t>(n, 1) + 15) / 16 * 16;
    taken_ += n;
    if (used_ + n <= size_) {
      used_ += n;
      return memory_.get() + used_ - n;
    }
    extra_.push_back(make_buffer(n));
    return extra_.back().get();
  }

  // Frees what did not fit.
  void finish() {
    if (taken_ > kKept) extra_.clear();
  }

 private:
  static constexpr std::int64_t kKept = 4 << 20;  // floats: 16 MB a thread at most
  Buffer memory_;
  std::vector<Buffer> extra_;
  std::int64_t size_ = 0, used_ = 0, taken_ = 0;
};

}  // namespace hydra::cpu
