#include "cuda/check.h"
#include "cuda/entries.h"
#include "cuda/lora_linear_kernel.cuh"

namespace hydra::cuda {
namespace {

template <typename T, typename P>
T* pointer(P address) {
  return reinterpret_cast<T*>(address);
}

template <typename T>
void decode(
    std::uintptr_t x, std::uintptr_t w, std::uintptr_t bias, std::uintptr_t a, std::uintptr_t b,
    std::int64_t stride_bn, std::int64_t stride_br, std::uintptr_t ids, std::uintptr_t owner,
    std::uintptr_t scale, std::uintptr_t s, std::uintptr_t counters, std::uintptr_t y, int num_rows,
    int num_outputs, int num_inputs, int num_ranks, int rows_per_id, std::uintptr_t stream) {
  LoraDecodeParams<T> p;
  p.x = pointer<const T>(x);
  p.w = pointer<const T>(w);
  p.bias = pointer<const T>(bias);
  p.a = pointer<const T>(a);
  p.b = pointer<const T>(b);
  p.stride_bn = stride_bn;
  p.stride_br = stride_br;
  p.ids = pointer<const std::int64_t>(ids);
  p.owner = pointer<const std::int64_t>(owner);
  p.scale = pointer<const float>(scale);
  p.s = pointer<float>(s);
  p.counters = pointer<int>(counters);
  p.y = pointer<T>(y);
  p.num_rows = num_rows;
  p.num_outputs = num_outputs;
  p.num_inputs = num_inputs;
  p.num_ranks = num_ranks;
  p.rows_per_id = rows_per_id;
  check(launch_lora_decode(p, pointer<CUstream_st>(stream)), "lora_linear");
}

}  // namespace

void lora_linear_decode(
    bool is_bf16, std::uintptr_t x, std::uintptr_t w, std::uintptr_t bias, std::uintptr_t a,
    std::uintptr_t b, std::int64_t stride_bn, std::int64_t stride_br, std::uintptr_t ids,
    std::uintptr_t owner, std::uintptr_t scale, std::uintptr_t s, std::uintptr_t counters,
    std::uintptr_t y, int num_rows, int num_outputs, int num_inputs, int num_ranks, int rows_per_id,
    int device, std::uintptr_t stream) {
  const DeviceGuard guard(device, "lora_linear");
  const auto run = is_bf16 ? &decode<__nv_bfloat16> : &decode<__half>;
  run(x, w, bias, a, b, stride_bn, stride_br, ids, owner, scale, s, counters, y, num_rows,
      num_outputs, num_inputs, num_ranks, rows_per_id, stream);
}

}  // namespace hydra::cuda
