// CUDA's execution model on one CPU thread.
//
// Each CUDA thread is a fiber with its own small stack. A fiber runs until a barrier, a warp
// collective, an atomic or the end, and the scheduler picks the next by the order it was told. As
// many blocks as it was told are resident and take turns; the rest wait for one of them to end.
//
// Kernels are compiled with -fsanitize=thread and no runtime of its: the compiler then calls
// __tsan_read4(address) and its like before every load and store that may leave the thread, and the
// functions of these names below look at each:
//   - outside of the tensors that were handed over, of __shared__ and of the arguments: an error;
//   - shared memory that nobody has written yet: an error;
//   - two accesses, one of them a write, that nothing orders: a race, an error. Barriers order the
//     threads of a block and __syncwarp those of a warp; a warp's threads are in no lockstep, and
//     shuffles order nothing, as in CUDA's manual. Between blocks the order is that of PTX: write,
//     __threadfence, atomic; then in the other block an atomic that saw it, __threadfence, read. A
//     barrier passes on to the block's threads what one of them knows. A write that a branch lets
//     through needs no fence after its atomic. Two writes of the same value are no race.
// Of -fsanitize=undefined come misaligned vectors, indices past an array's end, shifts, overflow.
//
// One file of 1,200 lines: fibers, clocks of order and what is known of memory are one state.
//
// An error ends the launch: its fibers are dropped where they are, and cudaGetLastError has it.
#include <link.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda_runtime.h"
#include "half_bits.h"

#if defined(__x86_64__) && !defined(CUDA_ON_CPU_UCONTEXT)
#define CUDA_ON_CPU_OWN_SWITCH  // ucontext's asks the kernel for the signal mask at each one
#else
#include <ucontext.h>
#endif

namespace cuda_on_cpu {
namespace {

constexpr std::size_t kStackBytes = 32 * 1024;
constexpr std::size_t kSharedBytes = 48 * 1024;  // what a block has without asking for more
constexpr int kMostThreads = 1024;
constexpr int kPatience = 200000;  // naps and atomics in a row in which nothing else happens

struct Settings {
  std::string order = "forward";  // of threads and blocks: or "reverse", "random"
  std::uint64_t seed = 1;
  int resident = 4;
  int multiprocessors = 4;
};

struct Buffer {
  std::uintptr_t begin, end;
  unsigned granule;  // bytes of an element: what one entry of the shadow stands for
};

// What one block tells others through an atomic.
struct Release {
  std::uint32_t block, thread, epoch, count;
  std::uint32_t fenced_epoch;         // of the thread's last fence: earlier epochs came before it
  std::vector<std::uint16_t> fences;  // how many each thread of the block has behind it
};
// The latest of each thread.
using Releases = std::unordered_map<std::uint64_t, std::shared_ptr<const Release>>;

// All zero: there was none. Small, since there are three for every element of a tensor.
struct Access {
  std::uint32_t block, epoch;
  std::uint16_t warp_epoch, fences, thread;
  bool there : 1, atomic : 1, read_only : 1;
};

struct Cell {
  Access write, read, other_read;  // the last two readers, of different threads
};

// One Cell an element of a tensor; memory is taken where a kernel looks.
struct Shadow {
  Cell* cells = nullptr;
  std::size_t bytes = 0;
};

struct Block;

struct Fiber {
#ifdef CUDA_ON_CPU_OWN_SWITCH
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  char* stack = nullptr;
  Block* block = nullptr;
  uint3 index{};
  std::uint16_t thread = 0;
  bool done = false;
  std::uint16_t fences = 0;
  std::uint32_t fenced_epoch = 0, releases = 0;
  Releases known, seen;  // seen: not yet behind a fence
  // A write over another thread's in the same epoch: allowed if it leaves the value as it was.
  const unsigned char* rewritten = nullptr;
  unsigned rewritten_bytes = 0;
  unsigned char was[32];
  Access before{};
};

struct Warp {
  int waiting = 0;
  std::uint16_t epoch = 0;
  const char* what = nullptr;
  Place place{};
  Lanes lanes;
};

struct Block {
  std::uint32_t number = 0;
  uint3 index{};
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Fiber*> ready;
  std::size_t next_ready = 0;
  int alive = 0, ended = 0;
  // The barrier
  int waiting = 0;
  std::uint32_t epoch = 1;
  Barrier kind{};
  Place place{};
  int any = 0, all = 1, count = 0, result = 0;
  Releases known, seen;
  // Shared memory
  char* shared = nullptr;
  std::vector<Cell> shadow;
  std::vector<bool> written;
  std::vector<const Variable*> variables;
  std::size_t used = 0;
};

struct Launch {
  const char* name;
  const Config* config;
  Thunk thunk;
  void* arguments;
  std::size_t argument_bytes;
  std::uint32_t num_blocks, threads;
  std::vector<Block*> resident;
  int idle = 0;
  std::string error;
};

Settings settings;
std::vector<Buffer> buffers;
std::vector<Shadow> shadows;
std::unordered_map<std::uintptr_t, Releases> releases;  // of an atomic's address
std::uint64_t random_state = 1;
Launch* launch_now = nullptr;
Fiber* running = nullptr;
cudaError_t last_error = cudaSuccess;
std::string last_message;
std::uint64_t num_launches = 0, num_blocks_run = 0, num_accesses = 0;

char* stacks = nullptr;
std::size_t stacks_bytes = 0;
char* arenas = nullptr;  // shared memory of the resident blocks
std::size_t arenas_bytes = 0;
std::ptrdiff_t next_variable = 0;
constexpr std::size_t kArenaBytes = 1 << 20;  // all variables of all kernels, side by side
std::uintptr_t image_begin = 0, image_end = 0;

std::uint64_t random_number() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

char* reserve(std::size_t bytes) {
  void* at = mmap(
      nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return at == MAP_FAILED ? nullptr : static_cast<char*>(at);
}

// ---- switching

#ifdef CUDA_ON_CPU_OWN_SWITCH
}  // namespace
}  // namespace cuda_on_cpu
extern "C" void cuda_on_cpu_switch(void** save, void* load);
asm(R"(
.text
.hidden cuda_on_cpu_switch
.globl cuda_on_cpu_switch
.type cuda_on_cpu_switch,@function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_cpu_switch,.-cuda_on_cpu_switch
)");
namespace cuda_on_cpu {
namespace {
void* scheduler_stack = nullptr;
void to_scheduler(Fiber* f) {
  cuda_on_cpu_switch(&f->stack_pointer, scheduler_stack);
}
void to_fiber(Fiber* f) {
  cuda_on_cpu_switch(&scheduler_stack, f->stack_pointer);
}
#else
ucontext_t scheduler_context;
void to_scheduler(Fiber* f) {
  swapcontext(&f->context, &scheduler_context);
}
void to_fiber(Fiber* f) {
  swapcontext(&scheduler_context, &f->context);
}
#endif

void end_of_fiber();

void run_fiber() {
  launch_now->thunk(launch_now->arguments);
  end_of_fiber();
}

void prepare(Fiber* f) {
#ifdef CUDA_ON_CPU_OWN_SWITCH
  auto* top = reinterpret_cast<void**>(f->stack + kStackBytes) - 2;
  *top = reinterpret_cast<void*>(&run_fiber);  // the address that `ret` takes
  top[1] = nullptr;
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  f->stack_pointer = top;
#else
  getcontext(&f->context);
  f->context.uc_stack.ss_sp = f->stack;
  f->context.uc_stack.ss_size = kStackBytes;
  f->context.uc_link = nullptr;
  makecontext(&f->context, &run_fiber, 0);
#endif
}

// ---- errors

std::string who(std::uint32_t block, std::uint32_t thread) {
  return "block " + std::to_string(block) + " thread " + std::to_string(thread);
}

std::string who(const Fiber& f) {
  return who(f.block->number, f.thread);
}

std::string at(Place place) {
  return std::string(place.file) + ":" + std::to_string(place.line);
}

std::string at_code(const void* code) {
  char text[64];
  std::snprintf(
      text, sizeof(text), "[code +0x%zx]", reinterpret_cast<std::uintptr_t>(code) - image_begin);
  return text;
}

// Ends the launch from inside a fiber, which is never run again.
[[noreturn]] void stop(const std::string& message) {
  if (launch_now == nullptr) {
    std::fprintf(stderr, "CUDA on CPU, outside of a launch: %s\n", message.c_str());
    std::abort();
  }
  if (launch_now->error.empty()) {
    launch_now->error = std::string(launch_now->name) + ": " + message;
  }
  if (running != nullptr) to_scheduler(running);
  std::abort();
}

// ---- what orders two accesses

bool covers(const Release& release, const Access& before) {
  if (release.block != before.block) return false;
  if (release.thread == before.thread) return before.fences < release.fences[before.thread];
  if (before.epoch >= release.epoch) return false;
  return before.fences < release.fences[before.thread] || before.epoch < release.fenced_epoch;
}

bool any_covers(const Releases& known, const Access& before) {
  for (const auto& [thread, release] : known) {
    if (covers(*release, before)) return true;
  }
  return false;
}

std::uint64_t key_of(const Release& release) {
  return static_cast<std::uint64_t>(release.block) << 16 | release.thread;
}

void learn(Releases& into, const Releases& from) {
  for (const auto& [thread, release] : from) {
    std::shared_ptr<const Release>& mine = into[thread];
    if (mine == nullptr || mine->count < release->count) mine = release;
  }
}

bool ordered(const Access& before, const Fiber& f, bool write) {
  const Block& block = *f.block;
  if (before.block == block.number) {
    if (before.thread == f.thread || before.epoch < block.epoch) return true;
    return before.thread / 32 == f.thread / 32 &&
           before.warp_epoch < block.warps[f.thread / 32].epoch;
  }
  if (any_covers(f.known, before) || any_covers(block.known, before)) return true;
  // Control dependence: a store is not made before its branch is decided.
  return write && (any_covers(f.seen, before) || any_covers(block.seen, before));
}

Access access_of(const Fiber& f, bool atomic) {
  Access a{};
  a.block = f.block->number;
  a.thread = f.thread;
  a.there = true;
  a.atomic = atomic;
  a.epoch = f.block->epoch;
  a.warp_epoch = f.block->warps[f.thread / 32].epoch;
  a.fences = f.fences;
  return a;
}

std::string describe(const void* address);

enum class Kind { kRead, kWrite, kAtomic, kReadOnly };

[[noreturn]] void race(
    const Fiber& f, const void* address, Kind kind, const Access& before, bool wrote) {
  const char* names[] = {"read", "write", "atomic", "read-only load"};
  std::string message = std::string("race: ") + names[static_cast<int>(kind)] + " of " +
                        describe(address) + " by " + who(f) + ", with a " +
                        (before.atomic ? "atomic"
                         : wrote       ? "write"
                                       : "read") +
                        " by " + who(before.block, before.thread) +
                        " that nothing orders before it";
  stop(message);
}

// A write over an unordered write is known to be one of the same value when it is done.
void settle(Fiber& f) {
  if (f.rewritten == nullptr) return;
  const unsigned char* address = f.rewritten;
  f.rewritten = nullptr;
  if (std::memcmp(address, f.was, f.rewritten_bytes) != 0) {
    race(f, address, Kind::kWrite, f.before, true);
  }
}

void check(Fiber& f, Cell& cell, const void* address, unsigned bytes, Kind kind) {
  const bool atomic = kind == Kind::kAtomic, write = kind == Kind::kWrite || atomic;
  const Access mine = access_of(f, atomic);
  const Access& last = cell.write;
  if (last.there && !(atomic && last.atomic)) {
    if (kind == Kind::kReadOnly) {
      stop(
          "a load through the read-only cache of " + describe(address) + " by " + who(f) + ": " +
          who(last.block, last.thread) + " has written there during this launch");
    }
    if (!ordered(last, f, write)) {
      if (kind != Kind::kWrite || last.atomic || bytes > sizeof(f.was)) {
        race(f, address, kind, last, true);
      }
      if (f.rewritten == nullptr) {
        f.rewritten = static_cast<const unsigned char*>(address);
        f.rewritten_bytes = bytes;
        std::memcpy(f.was, address, bytes);
        f.before = last;
      }
    }
  }
  if (write) {
    for (const Access* reader : {&cell.read, &cell.other_read}) {
      if (!reader->there) continue;
      if (reader->read_only) {
        stop(
            "a write to " + describe(address) + " by " + who(f) + ", which " +
            who(reader->block, reader->thread) + " has loaded through the read-only cache");
      }
      if (!ordered(*reader, f, true)) race(f, address, kind, *reader, false);
    }
    cell.write = mine;
    if (!atomic) cell.read.there = cell.other_read.there = false;
  } else {
    const bool same = cell.read.block == mine.block && cell.read.thread == mine.thread;
    if (cell.read.there && !same) cell.other_read = cell.read;
    const bool read_only = kind == Kind::kReadOnly || (same && cell.read.read_only);
    cell.read = mine;
    cell.read.read_only = read_only;
  }
}

std::size_t last_buffer = 0;

std::size_t buffer_of(std::uintptr_t address) {
  if (last_buffer < buffers.size() && address >= buffers[last_buffer].begin &&
      address < buffers[last_buffer].end) {
    return last_buffer;
  }
  for (std::size_t i = 0; i < buffers.size(); ++i) {
    if (address >= buffers[i].begin && address < buffers[i].end) return last_buffer = i;
  }
  return buffers.size();
}

std::string describe(const void* address) {
  const auto a = reinterpret_cast<std::uintptr_t>(address);
  char text[160];
  if (running != nullptr) {
    const Block& block = *running->block;
    const auto offset = static_cast<const char*>(address) - block.shared;
    for (const Variable* v : block.variables) {
      if (offset >= v->offset && offset < v->offset + static_cast<std::ptrdiff_t>(v->bytes)) {
        return std::string("__shared__ ") + v->name + " + " + std::to_string(offset - v->offset);
      }
    }
  }
  const std::size_t i = buffer_of(a);
  if (i < buffers.size()) {
    std::snprintf(
        text, sizeof(text), "byte %zu of tensor %zu, which has %zu",
        static_cast<std::size_t>(a - buffers[i].begin), i,
        static_cast<std::size_t>(buffers[i].end - buffers[i].begin));
    return text;
  }
  std::ptrdiff_t best = PTRDIFF_MAX;
  std::string nearest = "no tensor near";
  for (std::size_t k = 0; k < buffers.size(); ++k) {
    const auto past = static_cast<std::ptrdiff_t>(a - buffers[k].end);
    const auto ahead = static_cast<std::ptrdiff_t>(buffers[k].begin - a);
    const bool behind = past >= 0;
    const std::ptrdiff_t distance = behind ? past : ahead;
    if (distance < best) {
      best = distance;
      nearest = std::to_string(distance) + " bytes " + (behind ? "past the end of" : "ahead of") +
                " tensor " + std::to_string(k) + ", which has " +
                std::to_string(buffers[k].end - buffers[k].begin) + " bytes";
    }
  }
  return "memory outside of every tensor (" + nearest + ")";
}

void shared_access(Fiber& f, std::uintptr_t address, std::size_t bytes, Kind kind, void* code) {
  Block& block = *f.block;
  const auto offset = address - reinterpret_cast<std::uintptr_t>(block.shared);
  if (offset + bytes > static_cast<std::size_t>(next_variable)) {
    stop("access past the end of __shared__ memory by " + who(f) + " " + at_code(code));
  }
  for (std::size_t k = 0; k < bytes; ++k) {
    const auto* byte = reinterpret_cast<const char*>(address + k);
    if (kind != Kind::kWrite && !block.written[offset + k]) {
      stop(
          "read of " + describe(byte) + " by " + who(f) + ", which no thread has written " +
          at_code(code));
    }
    if (kind == Kind::kWrite) block.written[offset + k] = true;
  }
  // Every byte has its own history: bool arrays are written by a thread each.
  for (std::size_t k = 0; k < bytes; ++k) {
    const unsigned rest = static_cast<unsigned>(bytes - k);
    check(f, block.shadow[offset + k], reinterpret_cast<const char*>(address + k), rest, kind);
  }
}

void global_access(Fiber& f, std::uintptr_t address, std::size_t bytes, Kind kind, void* code) {
  const bool write = kind == Kind::kWrite || kind == Kind::kAtomic;
  const std::size_t i = buffer_of(address);
  if (i == buffers.size() || address + bytes > buffers[i].end) {
    const auto arguments = reinterpret_cast<std::uintptr_t>(launch_now->arguments);
    if (!write && address >= arguments &&
        address + bytes <= arguments + launch_now->argument_bytes) {
      return;
    }
    if (!write && address >= image_begin && address + bytes <= image_end) return;  // constants
    stop(
        std::string(write ? "write of " : "read of ") + std::to_string(bytes) + " bytes by " +
        who(f) + " at " +
        describe(reinterpret_cast<const void*>(address + (i < buffers.size() ? bytes - 1 : 0))) +
        " " + at_code(code));
  }
  const Buffer& buffer = buffers[i];
  Shadow& shadow = shadows[i];
  if (shadow.cells == nullptr) {
    shadow.bytes = ((buffer.end - buffer.begin) / buffer.granule + 1) * sizeof(Cell);
    shadow.cells = reinterpret_cast<Cell*>(reserve(shadow.bytes));
  }
  const std::size_t first = (address - buffer.begin) / buffer.granule;
  const std::size_t last = (address + bytes - 1 - buffer.begin) / buffer.granule;
  for (std::size_t at = first; at <= last; ++at) {
    const auto* element = reinterpret_cast<const char*>(buffer.begin + at * buffer.granule);
    const std::size_t rest = address + bytes - (buffer.begin + at * buffer.granule);
    check(
        f, shadow.cells[at], element, static_cast<unsigned>(std::min<std::size_t>(rest, 32)), kind);
  }
}

void access(const void* pointer, std::size_t bytes, Kind kind, void* code) {
  Fiber* f = running;
  if (f == nullptr || bytes == 0) return;
  const auto address = reinterpret_cast<std::uintptr_t>(pointer);
  if (address - reinterpret_cast<std::uintptr_t>(stacks) < stacks_bytes) return;
  ++num_accesses;
  settle(*f);
  if (address - reinterpret_cast<std::uintptr_t>(arenas) < arenas_bytes) {
    shared_access(*f, address, bytes, kind, code);
  } else {
    global_access(*f, address, bytes, kind, code);
  }
}

// ---- the scheduler

void make_ready(Block& block, std::vector<Fiber*> woken) {
  if (settings.order == "reverse") {
    std::reverse(woken.begin(), woken.end());
  } else if (settings.order == "random") {
    for (std::size_t i = woken.size(); i > 1; --i) {
      std::swap(woken[i - 1], woken[random_number() % i]);
    }
  }
  if (block.next_ready == block.ready.size()) block.ready.clear(), block.next_ready = 0;
  block.ready.insert(block.ready.end(), woken.begin(), woken.end());
  launch_now->idle = 0;
}

// Gives way; the fiber is still ready.
void give_way(Fiber& f) {
  Block& block = *f.block;
  if (++launch_now->idle > kPatience) {
    stop(
        who(f) + " waits for something that no resident block will do (" +
        std::to_string(launch_now->resident.size()) + " of " +
        std::to_string(launch_now->num_blocks) + " blocks are resident or done)");
  }
  block.ready.push_back(&f);
  to_scheduler(&f);
}

void end_of_fiber() {
  Fiber& f = *running;
  settle(f);
  Block& block = *f.block;
  f.done = true;
  --block.alive;
  ++block.ended;
  launch_now->idle = 0;
  if (block.waiting > 0) {
    stop(
        "diverged barrier: " + who(f) + " has ended, while " + std::to_string(block.waiting) +
        " threads of its block wait at " + at(block.place));
  }
  const Warp& warp = block.warps[f.thread / 32];
  if (warp.waiting > 0 && (warp.lanes.mask >> f.thread % 32 & 1)) {
    stop(
        std::string("diverged warp: ") + who(f) + " has ended, while its warp waits for it in " +
        warp.what + " at " + at(warp.place));
  }
  to_scheduler(&f);
  std::abort();
}

void begin(Block& block, std::uint32_t number, std::size_t slot) {
  const Launch& launch = *launch_now;
  const dim3& grid = launch.config->grid;
  block.number = number;
  block.index = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
  block.shared = arenas + slot * kArenaBytes;
  const std::size_t used = static_cast<std::size_t>(next_variable) + launch.config->shared_bytes;
  std::memset(block.shared, 0xff, std::min(used + 64, kArenaBytes));  // NaN
  block.fibers.resize(launch.threads);
  block.warps.resize((launch.threads + 31) / 32);
  std::vector<Fiber*> all;
  for (std::uint32_t t = 0; t < launch.threads; ++t) {
    Fiber& f = block.fibers[t];
    const dim3& size = launch.config->block;
    f.block = &block;
    f.thread = static_cast<std::uint16_t>(t);
    f.index = {t % size.x, t / size.x % size.y, t / size.x / size.y};
    f.stack = stacks + (slot * launch.threads + t) * kStackBytes;
    prepare(&f);
    all.push_back(&f);
  }
  block.alive = static_cast<int>(launch.threads);
  make_ready(block, all);
  ++num_blocks_run;
}

void run_blocks() {
  Launch& launch = *launch_now;
  std::vector<std::uint32_t> order(launch.num_blocks);
  for (std::uint32_t b = 0; b < launch.num_blocks; ++b) order[b] = b;
  if (settings.order == "reverse") std::reverse(order.begin(), order.end());
  if (settings.order == "random") {
    for (std::size_t i = order.size(); i > 1; --i)
      std::swap(order[i - 1], order[random_number() % i]);
  }
  const std::size_t slots =
      std::min<std::size_t>(static_cast<std::size_t>(settings.resident), launch.num_blocks);
  std::vector<std::unique_ptr<Block>> at(slots);
  std::size_t next = 0, turn = 0;
  for (;;) {
    launch.resident.clear();
    std::vector<std::size_t> able;
    for (std::size_t slot = 0; slot < slots; ++slot) {
      if (at[slot] != nullptr && at[slot]->alive == 0) at[slot] = nullptr;
      if (at[slot] == nullptr && next < order.size()) {
        at[slot] = std::make_unique<Block>();
        begin(*at[slot], order[next++], slot);
      }
      if (at[slot] == nullptr) continue;
      launch.resident.push_back(at[slot].get());
      if (at[slot]->next_ready < at[slot]->ready.size()) able.push_back(slot);
    }
    if (launch.resident.empty()) return;
    if (able.empty()) {
      const Block& block = *launch.resident[0];
      launch.error = std::string(launch.name) + ": deadlock: ";
      if (block.waiting > 0) {
        launch.error += std::to_string(block.waiting) + " of " + std::to_string(launch.threads) +
                        " threads of block " + std::to_string(block.number) + " wait at " +
                        cuda_on_cpu::at(block.place);
      }
      for (const Warp& warp : block.warps) {
        if (warp.waiting == 0) continue;
        launch.error += std::string("; ") + std::to_string(warp.waiting) +
                        " lanes of a warp wait in " + warp.what + " at " +
                        cuda_on_cpu::at(warp.place);
        break;
      }
      return;
    }
    // A block keeps its turn for a while: until one of its fibers gives way, all go on in order.
    const std::size_t pick =
        settings.order == "random" ? random_number() % able.size() : turn++ % able.size();
    Block& block = *at[able[pick]];
    const std::size_t steps =
        std::min<std::size_t>(block.ready.size() - block.next_ready, launch.threads);
    const std::size_t most = settings.order == "random" ? 1 + random_number() % steps : steps;
    for (std::size_t step = 0; step < most && block.next_ready < block.ready.size(); ++step) {
      running = block.ready[block.next_ready++];
      if (block.next_ready == block.ready.size()) block.ready.clear(), block.next_ready = 0;
      to_fiber(running);
      running = nullptr;
      if (!launch.error.empty()) return;
    }
    if (block.next_ready > 4096) {
      block.ready.erase(
          block.ready.begin(), block.ready.begin() + static_cast<std::ptrdiff_t>(block.next_ready));
      block.next_ready = 0;
    }
  }
}

void find_image() {
  if (image_begin != 0) return;
  dl_iterate_phdr(
      [](dl_phdr_info* info, std::size_t, void*) {
        std::uintptr_t begin = UINTPTR_MAX, end = 0;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
          const std::uintptr_t from = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
          begin = std::min(begin, from);
          end = std::max(end, static_cast<std::uintptr_t>(from + info->dlpi_phdr[i].p_memsz));
        }
        const auto here = reinterpret_cast<std::uintptr_t>(&settings);
        if (here < begin || here >= end) return 0;
        image_begin = begin, image_end = end;
        return 1;
      },
      nullptr);
}

void refuse(const char* name, const std::string& why) {
  last_error = cudaErrorInvalidConfiguration;
  last_message = std::string(name) + ": " + why;
}

}  // namespace

// ---- what kernels call

uint3 thread_index() {
  return running->index;
}
uint3 block_index() {
  return running->block->index;
}
dim3 block_size() {
  return launch_now->config->block;
}
dim3 grid_size() {
  return launch_now->config->grid;
}

void launch_bounds(unsigned most) {
  if (launch_now->threads > most) {
    stop(
        std::to_string(launch_now->threads) + " threads in a block of a kernel that is bound to " +
        std::to_string(most));
  }
}

void fail(const char* message) {
  stop(running == nullptr ? message : message + (", " + who(*running)));
}

void* shared_storage(Variable& v) {
  Block& block = *running->block;
  if (v.offset < 0) {
    next_variable = (next_variable + 15) / 16 * 16;
    v.offset = next_variable;
    next_variable += static_cast<std::ptrdiff_t>(v.bytes);
    if (next_variable > static_cast<std::ptrdiff_t>(kArenaBytes))
      stop("too many __shared__ variables");
    for (Block* b : launch_now->resident) {
      std::memset(b->shared + v.offset, 0xff, v.bytes);
    }
    std::memset(block.shared + v.offset, 0xff, v.bytes);
  }
  if (block.shadow.size() < static_cast<std::size_t>(next_variable)) {
    block.shadow.resize(static_cast<std::size_t>(next_variable));
    block.written.resize(static_cast<std::size_t>(next_variable));
  }
  if (std::find(block.variables.begin(), block.variables.end(), &v) == block.variables.end()) {
    block.variables.push_back(&v);
    block.used += v.bytes;
    if (block.used > kSharedBytes) stop("more than 48 KB of __shared__ memory");
  }
  return block.shared + v.offset;
}

int sync_threads(Barrier kind, int predicate, Place place) {
  Fiber& f = *running;
  settle(f);
  Block& block = *f.block;
  if (block.ended > 0) {
    stop(
        "diverged barrier: " + who(f) + " waits at " + at(place) + ", where " +
        std::to_string(block.ended) + " threads of its block have ended");
  }
  if (block.waiting > 0 && (kind != block.kind || place.line != block.place.line ||
                            std::strcmp(place.file, block.place.file) != 0)) {
    stop(
        "diverged barrier: " + who(f) + " waits at " + at(place) + ", others of its block at " +
        at(block.place));
  }
  block.kind = kind, block.place = place;
  block.any |= predicate != 0, block.all &= predicate != 0, block.count += predicate != 0;
  if (++block.waiting < block.alive) {
    to_scheduler(&f);
    return block.result;
  }
  const int results[] = {0, block.any, block.all, block.count};
  block.result = results[static_cast<int>(kind)];
  block.any = 0, block.all = 1, block.count = 0, block.waiting = 0;
  ++block.epoch;
  std::vector<Fiber*> woken;
  for (Fiber& other : block.fibers) {
    learn(block.known, other.known);
    learn(block.seen, other.seen);
    other.known.clear(), other.seen.clear();
    woken.push_back(&other);
  }
  make_ready(block, woken);
  to_scheduler(&f);
  return block.result;
}

void collective(
    const char* what, Combine combine, unsigned mask, const void* in, std::size_t in_bytes,
    void* out, std::size_t out_bytes, Place place) {
  Fiber& f = *running;
  settle(f);
  Block& block = *f.block;
  Warp& warp = block.warps[f.thread / 32];
  const unsigned lane = f.thread % 32, first = f.thread / 32 * 32;
  if (!(mask >> lane & 1)) stop(who(f) + " is not in its own mask of " + what + " at " + at(place));
  if (warp.waiting > 0 && (mask != warp.lanes.mask || std::strcmp(what, warp.what) != 0 ||
                           place.line != warp.place.line)) {
    stop(
        std::string("diverged warp: ") + who(f) + " is in " + what + " at " + at(place) +
        ", others of its warp in " + warp.what + " at " + at(warp.place));
  }
  int expected = 0;
  for (unsigned l = 0; l < 32 && first + l < launch_now->threads; ++l) {
    if (!(mask >> l & 1)) continue;
    ++expected;
    if (block.fibers[first + l].done) {
      stop(
          std::string("diverged warp: ") + what + " at " + at(place) + " by " + who(f) +
          " waits for thread " + std::to_string(first + l) + ", which has ended");
    }
  }
  warp.what = what, warp.place = place, warp.lanes.what = what, warp.lanes.mask = mask;
  if (in_bytes > 64 || out_bytes > 64) std::abort();
  std::memcpy(warp.lanes.in[lane], in, in_bytes);
  if (++warp.waiting < expected) {
    to_scheduler(&f);
  } else {
    combine(warp.lanes);
    warp.waiting = 0;
    std::vector<Fiber*> woken;
    for (unsigned l = 0; l < 32 && first + l < launch_now->threads; ++l) {
      if (mask >> l & 1) woken.push_back(&block.fibers[first + l]);
    }
    make_ready(block, woken);
    to_scheduler(&f);
  }
  std::memcpy(out, warp.lanes.out[lane], out_bytes);
}

void sync_warp(unsigned mask, Place place) {
  if (mask != 0xffffffffu) stop("__syncwarp of a part of a warp is not emulated, at " + at(place));
  char nothing = 0;
  collective(
      "__syncwarp", [](Lanes&) { ++running->block->warps[running->thread / 32].epoch; }, mask,
      &nothing, 1, &nothing, 1, place);
}

unsigned vote(Vote kind, const char* what, unsigned mask, int predicate, Place place) {
  const unsigned char in = predicate != 0;
  unsigned ballot = 0;
  collective(
      what,
      [](Lanes& lanes) {
        unsigned all = 0;
        for (unsigned l = 0; l < 32; ++l) {
          if ((lanes.mask >> l & 1) && lanes.in[l][0]) all |= 1u << l;
        }
        for (unsigned l = 0; l < 32; ++l) std::memcpy(lanes.out[l], &all, sizeof(all));
      },
      mask, &in, 1, &ballot, sizeof(ballot), place);
  return kind == Vote::kAny ? ballot != 0 : kind == Vote::kAll ? ballot == mask : ballot;
}

void fence() {
  Fiber& f = *running;
  settle(f);
  ++f.fences;
  f.fenced_epoch = f.block->epoch;
  learn(f.known, f.seen);
  learn(f.known, f.block->seen);
  f.seen.clear();
}

void nap() {
  settle(*running);
  give_way(*running);
}

void atomic_access(const void* address, std::size_t bytes) {
  Fiber& f = *running;
  settle(f);
  give_way(f);
  if (reinterpret_cast<std::uintptr_t>(address) % bytes != 0) {
    stop("misaligned atomic at " + describe(address) + " by " + who(f));
  }
  access(address, bytes, Kind::kAtomic, __builtin_return_address(0));
  // What the atomic sees, and what it tells.
  const auto key = reinterpret_cast<std::uintptr_t>(address);
  if (key - reinterpret_cast<std::uintptr_t>(arenas) < arenas_bytes) return;
  Releases& here = releases[key];
  learn(f.seen, here);
  auto mine = std::make_shared<Release>();
  mine->block = f.block->number;
  mine->thread = f.thread;
  mine->epoch = f.block->epoch;
  mine->fenced_epoch = f.fences > 0 ? f.fenced_epoch : 0;
  for (const Fiber& other : f.block->fibers) mine->fences.push_back(other.fences);
  mine->count = ++f.releases;
  here[key_of(*mine)] = std::move(mine);
  learn(here, f.known);
  learn(here, f.block->known);
}

void read_only_access(const void* address, std::size_t bytes) {
  access(address, bytes, Kind::kReadOnly, __builtin_return_address(0));
}

void ptx(const char* text, const Operand* operands, int count) {
  char name[128] = {};
  std::size_t length = 0;
  while (text[length] != ' ' && text[length] != '\0' && length < sizeof(name) - 1) {
    name[length] = text[length];
    ++length;
  }
  const bool half = std::strcmp(name, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32") == 0;
  const bool bfloat = std::strcmp(name, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32") == 0;
  if (!half && !bfloat) stop(std::string("this PTX is not emulated: ") + text);
  // d0-d3, a0-a3, b0-b1, c0-c3 in the order of the text, which names them %0, %1, ...
  void* at[14];
  int found = 0;
  for (const char* c = text + length; *c != '\0'; ++c) {
    if (*c != '%') continue;
    const int which = std::atoi(c + 1);
    if (found == 14 || which >= count || operands[which].bytes != 4) {
      stop(std::string("operands of the wrong number or size: ") + text);
    }
    at[found++] = operands[which].at;
  }
  if (found != 14) stop(std::string("operands are missing: ") + text);
  unsigned char in[41], out[16];
  in[40] = half;
  for (int i = 0; i < 10; ++i) std::memcpy(in + 4 * i, at[4 + i], 4);
  collective(
      name,
      [](Lanes& lanes) {
        if (lanes.mask != 0xffffffffu) stop("mma needs all lanes");
        // Fragments of m16n8k16, PTX manual: lane = 4 group + part.
        static float a[16][16], b[16][8], c[16][8];
        for (int lane = 0; lane < 32; ++lane) {
          const int group = lane / 4, part = lane % 4;
          unsigned regs[6];
          float sums[4];
          std::memcpy(regs, lanes.in[lane], sizeof(regs));
          std::memcpy(sums, lanes.in[lane] + sizeof(regs), sizeof(sums));
          const bool is_half = lanes.in[lane][40];
          for (int r = 0; r < 6; ++r) {
            for (int i = 0; i < 2; ++i) {
              const auto bits = static_cast<std::uint16_t>(regs[r] >> 16 * i);
              const float x = is_half ? half_value(bits) : bfloat_value(bits);
              if (r < 4) {
                a[group + r % 2 * 8][part * 2 + i + r / 2 * 8] = x;
              } else {
                b[part * 2 + i + (r - 4) * 8][group] = x;
              }
            }
          }
          for (int i = 0; i < 4; ++i) c[group + i / 2 * 8][part * 2 + i % 2] = sums[i];
        }
        for (int lane = 0; lane < 32; ++lane) {
          float sums[4];
          for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
            double sum = c[row][col];
            for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * b[k][col];
            sums[i] = static_cast<float>(sum);
          }
          std::memcpy(lanes.out[lane], sums, sizeof(sums));
        }
      },
      0xffffffffu, in, sizeof(in), out, sizeof(out), Place{"mma.sync", 0});
  for (int i = 0; i < 4; ++i) std::memcpy(at[i], out + 4 * i, 4);
}

void run(const char* name, const Config& config, Thunk thunk, void* arguments, std::size_t bytes) {
  ++num_launches;
  if (last_error != cudaSuccess) return;
  const std::uint64_t threads =
      static_cast<std::uint64_t>(config.block.x) * config.block.y * config.block.z;
  const std::uint64_t blocks =
      static_cast<std::uint64_t>(config.grid.x) * config.grid.y * config.grid.z;
  if (threads == 0 || threads > kMostThreads) {
    return refuse(name, std::to_string(threads) + " threads in a block");
  }
  if (blocks == 0 || config.grid.x > 0x7fffffffu || config.grid.y > 65535 ||
      config.grid.z > 65535) {
    return refuse(
        name, "a grid of " + std::to_string(config.grid.x) + " x " + std::to_string(config.grid.y) +
                  " x " + std::to_string(config.grid.z) + " blocks");
  }
  if (blocks > 1u << 22) return refuse(name, "more blocks than it makes sense to emulate");
  find_image();
  if (stacks == nullptr) {
    stacks_bytes = 16 * static_cast<std::size_t>(kMostThreads) * kStackBytes;
    arenas_bytes = 16 * kArenaBytes;
    stacks = reserve(stacks_bytes);
    arenas = reserve(arenas_bytes);
  }
  random_state = settings.seed * 0x9e3779b97f4a7c15u | 1;
  shadows.assign(buffers.size(), {});
  releases.clear();
  Launch launch{};
  launch.name = name, launch.config = &config, launch.thunk = thunk;
  launch.arguments = arguments, launch.argument_bytes = bytes;
  launch.num_blocks = static_cast<std::uint32_t>(blocks);
  launch.threads = static_cast<std::uint32_t>(threads);
  launch_now = &launch;
  run_blocks();
  launch_now = nullptr;
  running = nullptr;
  for (const Shadow& shadow : shadows) {
    if (shadow.cells != nullptr) munmap(shadow.cells, shadow.bytes);
  }
  shadows.clear();
  if (!launch.error.empty()) {
    last_error = cudaErrorLaunchFailure;
    last_message = launch.error;
  }
}

// ---- what tests call

namespace py = pybind11;

void bind(py::module_& m) {
  m.def(
      "configure",
      [](const std::string& order, std::uint64_t seed, int resident, int multiprocessors) {
        if (resident < 1 || resident > 16 || multiprocessors < 1) {
          throw std::invalid_argument("1 to 16 resident blocks, 1 multiprocessor or more");
        }
        settings = {order, seed, resident, multiprocessors};
      },
      py::kw_only(), py::arg("order"), py::arg("seed"), py::arg("resident"),
      py::arg("multiprocessors"));
  // The memory that the next launches may touch: (address, bytes, bytes of an element) each.
  m.def(
      "set_buffers", [](const std::vector<std::tuple<std::uintptr_t, std::size_t, unsigned>>& of) {
        std::vector<Buffer> sorted;
        for (const auto& [begin, bytes, granule] : of) {
          if (bytes > 0) sorted.push_back({begin, begin + bytes, granule});
        }
        std::sort(sorted.begin(), sorted.end(), [](const Buffer& a, const Buffer& b) {
          return a.begin < b.begin;
        });
        buffers.clear();
        for (const Buffer& b : sorted) {
          if (!buffers.empty() && b.begin < buffers.back().end) {  // views of one tensor
            buffers.back().end = std::max(buffers.back().end, b.end);
            buffers.back().granule = std::min(buffers.back().granule, b.granule);
          } else {
            buffers.push_back(b);
          }
        }
      });
  m.def("counts", [] {
    py::dict out;
    out["launches"] = num_launches;
    out["blocks"] = num_blocks_run;
    out["accesses"] = num_accesses;
    return out;
  });
}

}  // namespace cuda_on_cpu

// ---- the host's side of CUDA

namespace {
std::string told;  // outlives the error that it belongs to
}

cudaError_t cudaGetLastError() {
  const cudaError_t status = cuda_on_cpu::last_error;
  if (status != cudaSuccess) told = cuda_on_cpu::last_message;
  cuda_on_cpu::last_error = cudaSuccess;
  return status;
}

const char* cudaGetErrorString(cudaError_t) {
  return told.c_str();
}

const char* cudaGetErrorName(cudaError_t status) {
  return status == cudaErrorLaunchFailure          ? "cudaErrorLaunchFailure"
         : status == cudaErrorInvalidConfiguration ? "cudaErrorInvalidConfiguration"
         : status == cudaSuccess                   ? "cudaSuccess"
                                                   : "cudaErrorInvalidValue";
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  *value = cuda_on_cpu::settings.multiprocessors;
  return cudaSetDevice(device);
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  std::snprintf(properties->name, sizeof(properties->name), "CUDA on CPU");
  properties->multiProcessorCount = cuda_on_cpu::settings.multiprocessors;
  return cudaSetDevice(device);
}

// ---- what the compiler calls

using cuda_on_cpu::Kind;

#define CODE __builtin_return_address(0)
#define HOOKS(bytes)                                   \
  void __tsan_read##bytes(void* a) {                   \
    cuda_on_cpu::access(a, bytes, Kind::kRead, CODE);  \
  }                                                    \
  void __tsan_write##bytes(void* a) {                  \
    cuda_on_cpu::access(a, bytes, Kind::kWrite, CODE); \
  }                                                    \
  void __tsan_unaligned_read##bytes(void* a) {         \
    cuda_on_cpu::access(a, bytes, Kind::kRead, CODE);  \
  }                                                    \
  void __tsan_unaligned_write##bytes(void* a) {        \
    cuda_on_cpu::access(a, bytes, Kind::kWrite, CODE); \
  }                                                    \
  void __tsan_volatile_read##bytes(void* a) {          \
    cuda_on_cpu::access(a, bytes, Kind::kRead, CODE);  \
  }                                                    \
  void __tsan_volatile_write##bytes(void* a) {         \
    cuda_on_cpu::access(a, bytes, Kind::kWrite, CODE); \
  }

namespace {

struct Location {
  const char* file;
  unsigned line, column;
};

[[noreturn]] void undefined(const char* what, const void* data) {
  Location where;
  std::memcpy(&where, data, sizeof(where));
  std::string message = std::string(what) + " at " + where.file + ":" + std::to_string(where.line);
  if (cuda_on_cpu::running != nullptr) message += " by " + cuda_on_cpu::who(*cuda_on_cpu::running);
  cuda_on_cpu::stop(message);
}

}  // namespace

extern "C" {
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* a, unsigned long n) {
  cuda_on_cpu::access(a, n, Kind::kRead, CODE);
}
void __tsan_write_range(void* a, unsigned long n) {
  cuda_on_cpu::access(a, n, Kind::kWrite, CODE);
}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}

#define UNDEFINED(name, what, ...)                        \
  void __ubsan_handle_##name(void* data, ##__VA_ARGS__) { \
    undefined(what, data);                                \
  }
UNDEFINED(type_mismatch_v1, "misaligned or null pointer", void*)
UNDEFINED(pointer_overflow, "pointer overflow", void*, void*)
UNDEFINED(out_of_bounds, "index past the end of an array", void*)
UNDEFINED(shift_out_of_bounds, "shift by more than the width", void*, void*)
UNDEFINED(add_overflow, "overflow of a sum", void*, void*)
UNDEFINED(sub_overflow, "overflow of a difference", void*, void*)
UNDEFINED(mul_overflow, "overflow of a product", void*, void*)
UNDEFINED(negate_overflow, "overflow of a negation", void*)
UNDEFINED(divrem_overflow, "division by zero or overflow", void*, void*)
UNDEFINED(load_invalid_value, "a bool or enum that is none", void*)
UNDEFINED(float_cast_overflow, "float too large for its integer", void*)
UNDEFINED(missing_return, "no return value")
UNDEFINED(builtin_unreachable, "unreachable code")
}
