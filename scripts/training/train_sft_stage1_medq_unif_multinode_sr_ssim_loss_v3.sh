#!/usr/bin/env bash
# Purpose: long run on all training sets with the conservative SSIM loss.
# Command:
#   bash scripts/training/train_sft_stage1_medq_unif_multinode_sr_ssim_loss_v3.sh \
#     EXP_NAME
# Cost: GPUs, steps and tokens stand in docs/launchers.md; the log tells the seconds of a step.
# Expected: ssim falls, mse stays level, restorations keep their texture.
set -euo pipefail
CONFIG=configs/experiments/stage1_medq_unif_multinode_sr_ssim_loss_v3.yaml
source "$(dirname "${BASH_SOURCE[0]}")/lib/launch.sh"
