// Generalised advantage estimation, row by row from the right.
#include <cstdint>

#include "cpu/entries.h"
#include "cpu/gae_rows.h"
#include "hydra/pointer.h"

namespace hydra::cpu {

void gae_fwd(
    std::uintptr_t rewards, std::uintptr_t values, std::uintptr_t mask, std::uintptr_t last_values,
    std::int64_t num_rows, std::int64_t num_cols, double gamma, double lam,
    std::uintptr_t advantages, std::uintptr_t returns) {
  const GAE in{
      pointer<const float>(rewards),
      pointer<const float>(values),
      pointer<const std::uint8_t>(mask),
      pointer<const float>(last_values),
      num_cols,
      gae_coefs(gamma, lam),
      pointer<float>(advantages),
      pointer<float>(returns)};
  for_row_tiles(num_rows, num_cols, [&](auto rows, std::int64_t first_row) {
    gae_rows<decltype(rows)::value>(in, first_row);
  });
}

}  // namespace hydra::cpu
