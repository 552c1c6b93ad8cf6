#!/usr/bin/env bash
# Purpose: fundus images with a pixel loss at all times of the flow, continuing an earlier
#   run of this launcher (START_FROM; `-- --resume_from None` starts from the base model).
# Command:
#   bash scripts/training/train_sft_stage1_medq_unif_multinode_eyeQ1_sr_pixel_loss.sh \
#     EXP_NAME
# Cost: GPUs, steps and tokens stand in docs/launchers.md; the log tells the seconds of a step.
# Expected: pixel falls together with mse.
set -euo pipefail
CONFIG=configs/experiments/stage1_medq_unif_multinode_eyeQ1_sr_pixel_loss.yaml
source "$(dirname "${BASH_SOURCE[0]}")/lib/launch.sh"
