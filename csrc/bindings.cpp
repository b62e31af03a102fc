// Table of contents of hydra_kernels._C: one line an entry. The bodies are in csrc/cpu and
// csrc/cuda, the argument checks in hydra_kernels/ops. An entry is named <op>_<pass>_<backend>.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "build_info.h"
#include "cpu/blas.h"
#include "cpu/entries.h"
#ifdef HYDRA_WITH_CUDA
#include "cuda/entries.h"
#endif

namespace py = pybind11;
using release_gil = py::call_guard<py::gil_scoped_release>;

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &hydra::build_info);
  m.def("ppo_loss_fwd_cpu", &hydra::cpu::ppo_loss_fwd, release_gil());

  m.def("kl_rewards_fwd_cpu", &hydra::cpu::kl_rewards_fwd, release_gil());
  m.def("gae_fwd_cpu", &hydra::cpu::gae_fwd, release_gil());
  m.def("masked_whiten_moments_cpu", &hydra::cpu::masked_whiten_moments, release_gil());
  m.def("masked_whiten_fwd_cpu", &hydra::cpu::masked_whiten_fwd, release_gil());
  m.def("advantages_fwd_cpu", &hydra::cpu::advantages_fwd, release_gil());
  m.def("linear_logprob_product_cpu", &hydra::cpu::linear_logprob_product, release_gil());
  m.def("linear_logprob_sums_cpu", &hydra::cpu::linear_logprob_sums, release_gil());
  m.def("linear_logprob_finish_cpu", &hydra::cpu::linear_logprob_finish, release_gil());
  m.def("linear_logprob_grads_cpu", &hydra::cpu::linear_logprob_grads, release_gil());
  m.def("set_gemm_bf16", &hydra::cpu::set_gemm_bf16);
  m.def("has_bf16_tiles", &hydra::cpu::has_bf16_tiles);
  m.def("lora_linear_fwd_cpu", &hydra::cpu::lora_linear_fwd, release_gil());
  m.def("lora_linear_bwd_cpu", &hydra::cpu::lora_linear_bwd, release_gil());
  m.def("lora_linear_few_fwd_cpu", &hydra::cpu::lora_linear_few_fwd, release_gil());
  m.def("lora_linear_few_bwd_cpu", &hydra::cpu::lora_linear_few_bwd, release_gil());
  m.def("lora_linear_merged_cpu", &hydra::cpu::lora_linear_merged, release_gil());
  m.def("lora_linear_only_id_cpu", &hydra::cpu::lora_linear_only_id, release_gil());
  m.def("replay_cpu", &hydra::cpu::replay, release_gil());

#ifdef HYDRA_WITH_CUDA
  m.def("device_name_cuda", &hydra::cuda::device_name, release_gil());
  m.def("ppo_loss_blocks_cuda", &hydra::cuda::ppo_loss_blocks, release_gil());
  m.def("ppo_loss_fwd_cuda", &hydra::cuda::ppo_loss_fwd, release_gil());

  m.def("kl_rewards_fwd_cuda", &hydra::cuda::kl_rewards_fwd, release_gil());
  m.def("gae_segment_tiles_cuda", &hydra::cuda::gae_segment_tiles, release_gil());
  m.def("gae_segments_cuda", &hydra::cuda::gae_segments, release_gil());
  m.def("gae_fwd_cuda", &hydra::cuda::gae_fwd, release_gil());
  m.def("masked_whiten_blocks_cuda", &hydra::cuda::masked_whiten_blocks, release_gil());
  m.def("masked_whiten_moments_cuda", &hydra::cuda::masked_whiten_moments, release_gil());
  m.def("masked_whiten_fwd_cuda", &hydra::cuda::masked_whiten_fwd, release_gil());
  m.def("advantages_fwd_cuda", &hydra::cuda::advantages_fwd, release_gil());
  m.def("linear_logprob_sums_cuda", &hydra::cuda::linear_logprob_sums, release_gil());
  m.def("linear_logprob_finish_cuda", &hydra::cuda::linear_logprob_finish, release_gil());
  m.def("linear_logprob_grads_cuda", &hydra::cuda::linear_logprob_grads, release_gil());
  m.def("lora_linear_decode_cuda", &hydra::cuda::lora_linear_decode, release_gil());
#endif
}
