#!/usr/bin/env bash
# Purpose: fundus images alone, continuing a checkpoint of the multinode run (START_FROM).
# Command:
#   bash scripts/training/train_sft_stage1_medq_unif_multinode_eyeQ2_ctu_from_stage1.sh \
#     EXP_NAME
# Cost: GPUs, steps and tokens stand in docs/launchers.md; the log tells the seconds of a step.
# Expected: PSNR on the fundus test set above that of the checkpoint it starts from.
set -euo pipefail
CONFIG=configs/experiments/stage1_medq_unif_multinode_eyeQ2_ctu_from_stage1.yaml
source "$(dirname "${BASH_SOURCE[0]}")/lib/launch.sh"
