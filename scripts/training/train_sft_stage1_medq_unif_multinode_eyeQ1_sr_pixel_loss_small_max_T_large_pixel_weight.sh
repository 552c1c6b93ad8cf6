#!/usr/bin/env bash
# Purpose: fundus images with a heavy pixel loss on nearly clean images, continuing a run of
#   the launcher ..._eyeQ1_sr_pixel_loss.sh (START_FROM).
# Command:
#   bash scripts/training/train_sft_stage1_medq_unif_multinode_eyeQ1_sr_pixel_loss_small_max_T_large_pixel_weight.sh \
#     EXP_NAME
# Cost: GPUs, steps and tokens stand in docs/launchers.md; the log tells the seconds of a step.
# Expected: pixel falls, mse stays level; total_norm tells when the weight is too large.
set -euo pipefail
CONFIG=configs/experiments/stage1_medq_unif_multinode_eyeQ1_sr_pixel_loss_small_max_T_large_pixel_weight.yaml
source "$(dirname "${BASH_SOURCE[0]}")/lib/launch.sh"
