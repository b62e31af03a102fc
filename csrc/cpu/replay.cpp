// Runs a list of tensor operations over fixed addresses: what a CUDA graph is on a GPU.
//
// hydra_kernels/replay records a function of PyTorch and lowers it to the instructions below, a
// few integers each. One call runs them all, so that a decoding step of a language model, some
// hundred operations on a few rows, costs its arithmetic and no calls. All threads walk the list
// together: each takes its part of an instruction, and they meet between two of them. What is too
// small to share is left to the first thread, which goes on without meeting the others.
//
// Sums are in float32, in an order that the number of threads does not change.
#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpu/entries.h"
#include "cpu/multiversion.h"
#include "cpu/parallel.h"
#include "cpu/replay_map.h"
#include "cpu/replay_products.h"
#include "cpu/replay_rows.h"
#include "cpu/replay_words.h"

namespace hydra::cpu {
namespace {

using namespace replaying;

// Where threads meet. They spin, because instructions are microseconds long; a thread that waits
// for much longer lets others have the core.
class Meeting {
 public:
  explicit Meeting(int threads) : threads_(threads) {}

  void wait() {
    const int round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    int spins = 0;
    while (round_.load(std::memory_order_acquire) == round) {
      if (++spins < 4000) {
#ifdef HYDRA_X86_LEVELS
        __builtin_ia32_pause();
#endif
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  const int threads_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> round_{0};
};

struct Task {
  const std::int64_t* program;
  const std::int64_t* end;
  const std::int64_t* table;
  int thread, threads;
  Meeting* meeting;
  std::atomic<bool>* strayed;  // whether an index was outside of its tensor; nothing is done there
};

template <int W>
HYDRA_INLINE void walk(const Task& task) {
  std::vector<float> scratch;
  bool together = true;  // whether the last instruction was shared
  for (const std::int64_t* at = task.program; at < task.end; at += at[1]) {
    const bool shared = at[2] != 0 && task.threads > 1;
    if (task.threads > 1 && (shared || together) && at != task.program) task.meeting->wait();
    together = shared;
    if (!shared && task.thread != 0) continue;
    const Words words{at + 3, task.table};
    const int thread = shared ? task.thread : 0, threads = shared ? task.threads : 1;
    switch (at[0]) {
      case kLinear:
        run_linear<W, false>(words, thread, threads);
        break;
      case kLinearT:
        run_linear<W, true>(words, thread, threads);
        break;
      case kMap:
        run_map(words, thread, threads);
        break;
      case kMean:
        run_rows<kMean>(words, thread, threads);
        break;
      case kLayerNorm:
        run_rows<kLayerNorm>(words, thread, threads);
        break;
      case kSoftmax:
        run_rows<kSoftmax>(words, thread, threads);
        break;
      case kSum:
        run_rows<kSum>(words, thread, threads);
        break;
      case kTopK:
        run_top_k(words);
        break;
      case kPick:
        run_pick(words, *task.strayed);
        break;
      case kExperts:
        run_experts<W>(words, thread, threads, scratch, *task.strayed);
        break;
      case kGather:
        run_gather(words, thread, threads, *task.strayed);
        break;
      case kPut:
        run_put(words, thread, threads, *task.strayed);
        break;
      case kAttention:
        run_attention<W>(words, thread, threads, scratch);
        break;
      case kDraw:
        run_draw(words, thread, threads, scratch, *task.strayed);
        break;
    }
  }
}

#ifdef HYDRA_X86_LEVELS
HYDRA_TARGET_V4 __attribute__((noinline)) void walk_v4(const Task& task) {
  walk<16>(task);
}

HYDRA_TARGET_V3 __attribute__((noinline)) void walk_v3(const Task& task) {
  walk<8>(task);
}
#endif

__attribute__((noinline)) void walk_baseline(const Task& task) {
  walk<4>(task);
}

void walk_best(const Task& task) {
  switch (isa_level()) {
#ifdef HYDRA_X86_LEVELS
    case Isa::kV4:
      return walk_v4(task);
    case Isa::kV3:
      return walk_v3(task);
#endif
    default:
      return walk_baseline(task);
  }
}

void check(const std::atomic<bool>& strayed) {
  if (strayed) throw std::out_of_range("replay: an index is outside of its tensor");
}

}  // namespace

void replay(std::uintptr_t program, std::int64_t num_words, std::uintptr_t table, int threads) {
  const auto* words = reinterpret_cast<const std::int64_t*>(program);
  const auto* addresses = reinterpret_cast<const std::int64_t*>(table);
  const auto* end = words + num_words;
  std::atomic<bool> strayed{false};
#ifdef _OPENMP
  if (threads > 1) {
    Meeting* meeting = nullptr;
    // A runtime may give fewer threads than it was asked for.
#pragma omp parallel num_threads(threads)
    {
#pragma omp single
      meeting = new Meeting(omp_get_num_threads());
      walk_best(
          {words, end, addresses, omp_get_thread_num(), omp_get_num_threads(), meeting, &strayed});
    }
    delete meeting;
    check(strayed);
    return;
  }
#endif
  walk_best({words, end, addresses, 0, 1, nullptr, &strayed});
  check(strayed);
}

}  // namespace hydra::cpu
