// Rewards, advantages, returns and the moments of the advantages: each row is taken from memory
// once and handed from step to step in cache.
#include <cstdint>
#include <vector>

#include "cpu/entries.h"
#include "cpu/gae_rows.h"
#include "cpu/kl_rewards_row.h"
#include "cpu/masked_whiten_block.h"
#include "hydra/pointer.h"

namespace hydra::cpu {

void advantages_fwd(
    std::uintptr_t scores, std::uintptr_t logprobs, std::uintptr_t ref_logprobs,
    std::uintptr_t values, std::uintptr_t mask, std::uintptr_t last_values, std::int64_t num_rows,
    std::int64_t num_cols, float kl_coef, int estimator, double gamma, double lam,
    std::uintptr_t rewards, std::uintptr_t advantages, std::uintptr_t returns,
    std::uintptr_t moments) {
  const std::uint8_t* counts = pointer<const std::uint8_t>(mask);
  float* result = pointer<float>(advantages);
  const KLRewards penalty{
      pointer<const float>(scores),
      pointer<const float>(logprobs),
      pointer<const float>(ref_logprobs),
      counts,
      num_cols,
      kl_coef,
      static_cast<KLEstimator>(estimator),
      pointer<float>(rewards)};
  const GAE scan{
      penalty.rewards, pointer<const float>(values), counts, pointer<const float>(last_values),
      num_cols,        gae_coefs(gamma, lam),        result, pointer<float>(returns)};
  std::vector<Moments> of_row(static_cast<std::size_t>(num_rows));
  for_row_tiles(num_rows, num_cols, [&](auto rows, std::int64_t first_row) {
    constexpr int kRows = decltype(rows)::value;
    for (int r = 0; r < kRows; ++r) kl_rewards_row(penalty, first_row + r);
    gae_rows<kRows>(scan, first_row);
    for (int r = 0; r < kRows; ++r) {
      const std::int64_t row = first_row + r;
      of_row[static_cast<std::size_t>(row)] =
          masked_moments(result + row * num_cols, counts + row * num_cols, num_cols);
    }
  });
  Moments total{0.0, 0.0, 0.0};
  for (const Moments& row : of_row) total = merge(total, row);
  store(total, pointer<double>(moments));
}

}  // namespace hydra::cpu
