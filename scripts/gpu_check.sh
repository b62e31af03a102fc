#!/usr/bin/env bash
# One command for a machine with an NVIDIA GPU: build, test, time the ops, run the PPO methods.
#
#   scripts/gpu_check.sh OUT [--only PART]... [--dry-run]
#
# At most 9 minutes; parts: build, tests, sanitizer, ops, ppo, and where asked for tune, 7 minutes. A
# part that fails or runs out of its time does not stop the next. It downloads nothing and writes
# only to OUT and build/. --dry-run goes through every part on a machine without a GPU.
# scripts/gpu_check/__main__.py has the rest.
set -euo pipefail
cd "$(dirname "$0")/.."
# Relative to where it was called from, as any other command's argument.
export GPU_CHECK_CALLED_FROM="$OLDPWD" PYTHONDONTWRITEBYTECODE=1
exec "${PYTHON:-python3}" scripts/gpu_check "$@"
