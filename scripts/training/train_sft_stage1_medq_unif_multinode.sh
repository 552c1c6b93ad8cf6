#!/usr/bin/env bash
# Purpose: restoration of all training sets with cross-entropy and velocity alone, on several nodes.
# Command:
#   bash scripts/training/train_sft_stage1_medq_unif_multinode.sh EXP_NAME
# Cost: GPUs, steps and tokens stand in docs/launchers.md; the log tells the seconds of a step.
# Expected: ce and mse fall, PSNR of restorations rises above the degraded input.
set -euo pipefail
CONFIG=configs/experiments/stage1_medq_unif_multinode.yaml
source "$(dirname "${BASH_SOURCE[0]}")/lib/launch.sh"
