#!/usr/bin/env bash
# Purpose: all training sets with a pixel loss on nearly clean images only.
# Command:
#   bash scripts/training/train_sft_stage1_medq_unif_multinode_eyeQ1_sr_pixel_loss_small_max_T.sh \
#     EXP_NAME
# Cost: GPUs, steps and tokens stand in docs/launchers.md; the log tells the seconds of a step.
# Expected: pixel falls, mse stays level.
set -euo pipefail
CONFIG=configs/experiments/stage1_medq_unif_multinode_eyeQ1_sr_pixel_loss_small_max_T.yaml
source "$(dirname "${BASH_SOURCE[0]}")/lib/launch.sh"
