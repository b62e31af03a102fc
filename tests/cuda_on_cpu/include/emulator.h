// What the stand-ins for CUDA's headers, and the kernels translated for them, ask of the emulator.
// How it works is in ../emulator.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <tuple>
#include <type_traits>
#include <utility>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct CUstream_st;

namespace cuda_on_cpu {

// Where in csrc a device function is called.
struct Place {
  const char* file;
  int line;
};

struct Config {
  dim3 grid, block;
  std::size_t shared_bytes = 0;
  CUstream_st* stream = nullptr;
};

uint3 thread_index() __attribute__((const));
uint3 block_index() __attribute__((const));
dim3 block_size() __attribute__((const));
dim3 grid_size() __attribute__((const));

// A kernel may not be launched with more threads than it was compiled for.
void launch_bounds(unsigned most);

// The storage of a __shared__ variable in the block that runs. One Variable a declaration (and
// template instance), wherever it is.
struct Variable {
  const char* name;
  std::size_t bytes, align;
  std::ptrdiff_t offset = -1;
};
void* shared_storage(Variable& variable);

enum class Barrier { kPlain, kOr, kAnd, kCount };
int sync_threads(Barrier kind, int predicate, Place place);
void sync_warp(unsigned mask, Place place);
void fence();
void nap();  // lets others run

// What the lanes of a warp do together. `in` and `out` are a lane's own; every lane that `mask`
// names must come with the same `what` and `mask` from the same place.
struct Lanes {
  unsigned mask;
  const char* what;
  unsigned char in[32][64];
  unsigned char out[32][64];
};
using Combine = void (*)(Lanes&);
void collective(
    const char* what, Combine combine, unsigned mask, const void* in, std::size_t in_bytes,
    void* out, std::size_t out_bytes, Place place);

// Before an atomic operation on `bytes` at `address`; other threads may run first.
void atomic_access(const void* address, std::size_t bytes);
// Before a load through the read-only cache: nobody may write there during the launch.
void read_only_access(const void* address, std::size_t bytes);
[[noreturn]] void fail(const char* message);

// asm volatile("...": outputs: inputs) becomes this. The text names its operands %0, %1, ...:
// outputs first, as the compiler numbers them.
struct Operand {
  void* at;
  int bytes;
};
void ptx(const char* text, const Operand* operands, int count);

template <std::size_t n>
struct Outputs {
  Operand of[n];
};
template <typename... Out>
Outputs<sizeof...(Out)> outputs(Out&... out) {
  return {{Operand{&out, static_cast<int>(sizeof(Out))}...}};
}

template <std::size_t n, typename... In>
void inline_asm(const char* text, Outputs<n> out, In... in) {
  Operand operands[n + sizeof...(In)];
  for (std::size_t i = 0; i < n; ++i) operands[i] = out.of[i];
  const Operand rest[] = {Operand{&in, static_cast<int>(sizeof(In))}...};
  for (std::size_t i = 0; i < sizeof...(In); ++i) operands[n + i] = rest[i];
  ptx(text, operands, static_cast<int>(n + sizeof...(In)));
}

using Thunk = void (*)(void*);
void run(const char* name, const Config& config, Thunk thunk, void* arguments, std::size_t bytes);

template <typename... P>
struct Call {
  void (*kernel)(P...);
  std::tuple<P...> arguments;
};

template <typename... P, std::size_t... I>
__attribute__((no_sanitize("thread"))) void call(Call<P...>& c, std::index_sequence<I...>) {
  c.kernel(std::get<I>(c.arguments)...);
}

// kernel<<<grid, block, shared, stream>>>(arguments) becomes this.
template <typename... P, typename... A>
void launch(const char* name, const Config& config, void (*kernel)(P...), A&&... arguments) {
  Call<P...> c{kernel, std::tuple<P...>(std::forward<A>(arguments)...)};
  run(
      name, config,
      [](void* at) { call(*static_cast<Call<P...>*>(at), std::index_sequence_for<P...>()); }, &c,
      sizeof(c));
}

}  // namespace cuda_on_cpu
