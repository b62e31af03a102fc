"""The CUDA kernels with one mistake each, and whether the tests of this folder notice.

``python -m tests.cuda_on_cpu.mutants [WORD...]`` compiles each one that has the words in its
description and runs the tests of its ops; it prints a table, and fails where one that is to be
found is not, or the other way round.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from typing import NamedTuple

from tests.cuda_on_cpu import build


class Mutant(NamedTuple):
    what: str
    file: str  # below csrc
    old: str  # every occurrence is replaced
    new: str
    tests: str  # pytest's -k
    found: bool = True


GAE = "cuda/gae_kernel.cuh"
MOMENTS = "cuda/block_moments.cuh"
PPO = "cuda/ppo_loss_kernel.cuh"
REWARDS = "cuda/kl_rewards_kernel.cuh"
WHITEN = "cuda/masked_whiten_kernel.cuh"
LOGPROB = "cuda/linear_logprob_kernel.cuh"
LORA = "cuda/lora_linear_kernel.cuh"
QUAD = "cuda/quad.cuh"

TILE_END = (
    "    __syncthreads();  // one a tile: the tiles take turns with the two halves of shared\n"
)

MUTANTS = [
    # a barrier is missing
    Mutant("gae: no barrier in a tile", GAE, TILE_END, "", "gae"),
    Mutant("gae: one half of shared for all tiles", GAE, "shared[tile % 2]", "shared[0]", "gae"),
    Mutant(
        "moments: no barrier before of_warp is used again",
        MOMENTS,
        "  __syncthreads();  // of_warp is used again\n",
        "",
        "whiten",
    ),
    Mutant(
        "moments: no barrier before the sum",
        MOMENTS,
        "  __syncthreads();\n  double total",
        "  double total",
        "whiten",
    ),
    Mutant(
        "ppo_loss: no barrier before the last block is told",
        PPO,
        "  __syncthreads();\n  if (!last)",
        "  if (!last)",
        "ppo",
    ),
    Mutant(
        "kl_rewards: no barrier after the start of the maximum",
        REWARDS,
        "last = -1;\n  __syncthreads();",
        "last = -1;",
        "kl_rewards",
    ),
    Mutant(
        "masked_whiten: no barrier before shared is read",
        WHITEN,
        "  __syncthreads();\n  const Whitening",
        "  const Whitening",
        "whiten",
    ),
    Mutant(
        "linear_logprob: no barrier before of_warp is used again",
        LOGPROB,
        "  __syncthreads();  // of_warp may still be read, from the call before\n",
        "",
        "logprob",
    ),
    Mutant(
        "lora_linear: no barrier before the warps' sums are read",
        LORA,
        "  __syncthreads();\n\n  for (int i",
        "\n  for (int i",
        "lora",
    ),
    # not all threads get to it
    Mutant(
        "kl_rewards: the vote of a block taken for a thread's own",
        REWARDS,
        "__syncthreads_or(counts[0]",
        "(counts[0]",
        "kl_rewards",
    ),
    Mutant(
        "kl_rewards: a barrier in a branch of some threads",
        REWARDS,
        "  if (mine) atomicMax(&last, static_cast<int>(threadIdx.x));"
        "  // integers: no order to depend on\n  __syncthreads();",
        "  if (mine) {\n    atomicMax(&last, static_cast<int>(threadIdx.x));\n"
        "    __syncthreads();\n  }",
        "kl_rewards",
    ),
    # fences and waiting
    Mutant(
        "moments: no fence before the ticket",
        MOMENTS,
        "    __threadfence();  // the moments are visible to every block before the ticket is\n",
        "",
        "whiten",
    ),
    Mutant(
        "ppo_loss: no fence after the ticket",
        PPO,
        "  if (!last) return;\n  __threadfence();",
        "  if (!last) return;",
        "ppo",
    ),
    Mutant(
        "lora_linear: no fence after the wait",
        LORA,
        "__nanosleep(64);\n    __threadfence();",
        "__nanosleep(64);",
        "lora or decode",
    ),
    Mutant(
        "lora_linear: no fence after s",
        LORA,
        "  __threadfence();  // s is visible before its tile counts as done\n",
        "",
        "lora or decode",
    ),
    Mutant(
        "lora_linear: no wait for s",
        LORA,
        "    while (atomicAdd(p.counters + 1, 0) < rank_tiles) __nanosleep(64);\n",
        "",
        "lora or decode",
    ),
    Mutant(
        "lora_linear: a count that nobody waits for, unordered before the reset",
        LORA,
        "of_adapter && any_on) atomicAdd",
        "of_adapter) atomicAdd",
        "lora or decode",
    ),
    Mutant(
        "lora_linear: blocks by their index, not by ticket",
        LORA,
        "ticket = atomicAdd(p.counters, 1);",
        "ticket = static_cast<int>(blockIdx.x);",
        "lora or decode",
    ),
    # counters
    Mutant("moments: ticket not set back", MOMENTS, "    *out.ticket = 0;\n", "", "whiten"),
    Mutant("ppo_loss: ticket not set back", PPO, "    *p.ticket = 0;\n", "", "ppo"),
    Mutant(
        "lora_linear: one counter not set back",
        LORA,
        "p.counters[0] = p.counters[1] =",
        "p.counters[0] =",
        "lora or decode",
    ),
    Mutant(
        "moments: no block is the last", MOMENTS, "unsigned>(num_blocks - 1)",
        "unsigned>(num_blocks)", "whiten",
    ),
    # lanes
    Mutant("gae: a scan of half a warp", GAE, "step < 32; step", "step < 16; step", "gae"),
    Mutant("gae: lanes past the warp's end", GAE, "if (lane + step < 32) map", "map", "gae"),
    Mutant("moments: sums of half a warp", MOMENTS, "int lane = 16", "int lane = 8", "whiten"),
    Mutant("ppo_loss: sums of half a warp", PPO, "int lane = 16", "int lane = 8", "ppo"),
    Mutant(
        "linear_logprob: the last warp forgotten",
        LOGPROB,
        "warp < kLogprobWarps; ++warp",
        "warp < kLogprobWarps - 1; ++warp",
        "logprob",
    ),
    # ends of tiles
    Mutant(
        "quad: a whole vector at the end",
        QUAD,
        "kAligned && i + kQuad <= n) {\n    const float4",
        "kAligned && i < n) {\n    const float4",
        "whiten",
    ),
    Mutant(
        "quad: one token past the end is stored", QUAD, "if (i + k < n) x[i + k]",
        "if (i + k <= n) x[i + k]", "whiten",
    ),
    Mutant(
        "quad: vectors on rows that do not begin on 16 bytes",
        QUAD,
        "bool aligned = num_cols % kQuad == 0 &&",
        "bool aligned =",
        "gae",
    ),
    Mutant(
        "linear_logprob: a whole vector at the end",
        LOGPROB,
        "begin + kLogprobVector <= count &&",
        "begin < count &&",
        "logprob",
    ),
    Mutant(
        "linear_logprob: a row of blocks too few",
        LOGPROB,
        "(num_rows + kLogprobThreads - 1) / kLogprobThreads",
        "num_rows / kLogprobThreads",
        "logprob",
    ),
    Mutant(
        "lora_linear: one row of W past the end",
        LORA,
        "first + group + 8 < num_tile_rows",
        "first + group + 8 <= num_tile_rows",
        "lora or decode",
    ),
    Mutant(
        "ppo_loss: blocks' sums overlap", PPO, "(blockIdx.x) * kNumPPOSums",
        "(blockIdx.x) * (kNumPPOSums - 1)", "ppo",
    ),
    # masks
    Mutant("quad: what is masked enters", QUAD, "keep[k] ? out.at[k] : 0.0f", "out.at[k]", "ppo"),
    Mutant(
        "linear_logprob: columns past the end count",
        LOGPROB,
        "inside ? logit.z : -INFINITY",
        "logit.z",
        "logprob",
    ),
    Mutant(
        "linear_logprob: earlier blocks of the vocabulary forgotten",
        LOGPROB,
        "if (p.first_column > 0) {",
        "if (p.first_column < 0) {",
        "logprob",
    ),
    # fragments of the tensor cores
    Mutant(
        "lora_linear: registers of A in another order",
        LORA,
        "a_low.x, a_high.x, a_low.y, a_high.y",
        "a_low.x, a_low.y, a_high.x, a_high.y",
        "lora or decode",
    ),
    Mutant(
        "lora_linear: rows and columns of the product exchanged",
        LORA,
        "lane % 4 * 2 + i % 2][lane / 4 + i / 2 * 8]",
        "lane % 4 * 2 + i / 2][lane / 4 + i % 2 * 8]",
        "lora or decode",
    ),
    # numbers
    Mutant(
        "whiten: deviations in float",
        "include/hydra/whiten.h",
        "static_cast<double>(x) - static_cast<double>(sums.shift)",
        "static_cast<double>(x - sums.shift)",
        "whiten",
    ),
    # what an emulator cannot see: the same results, more slowly
    Mutant(
        "lora_linear: bank conflicts", LORA, "[kLoraTile + 1];", "[kLoraTile];", "decode", False
    ),
    Mutant("quad: loads that stay in the cache", QUAD, "__ldcs(", "__ldcg(", "gae", False),
]  # fmt: skip


def broken(mutant: Mutant) -> str:
    text = (build.ROOT / "csrc" / mutant.file).read_text()
    if mutant.old not in text:
        raise ValueError(f"{mutant.what}: {mutant.file} has no {mutant.old!r}")
    return text.replace(mutant.old, mutant.new)


def try_one(mutant: Mutant) -> tuple[bool, str]:
    """Whether a test failed, and what the first one said."""
    module = build.build({mutant.file: broken(mutant)})
    here = "tests/cuda_on_cpu/"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=short",
         f"{here}test_schedules.py", f"{here}test_ops.py", "-k", mutant.tests],
        cwd=build.ROOT, capture_output=True, text=True,
        env={**os.environ, "CUDA_ON_CPU_MODULE": str(module), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    errors = re.findall(r"^E\s+(?:\w+: )?(.*)", done.stdout, re.MULTILINE)
    said = next((e for e in errors if "_kernel:" in e), next(iter(errors), ""))
    return done.returncode == 1, re.sub(r"^\w+: CUDA error: ", "", said)


def main(words: list[str]) -> int:
    unexpected = 0
    for mutant in MUTANTS:
        if not all(word in mutant.what for word in words):
            continue
        start = time.monotonic()
        found, said = try_one(mutant)
        unexpected += found != mutant.found
        verdict = ("found" if found else "passes") + ("" if found == mutant.found else " (!)")
        print(
            f"{verdict:10} {time.monotonic() - start:5.1f} s  {mutant.what}: {said[:110]}",
            flush=True,
        )
    return unexpected


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
