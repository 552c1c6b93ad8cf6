#!/usr/bin/env bash
# Purpose: fundus images alone, from the base model.
# Command:
#   bash scripts/training/train_sft_stage1_medq_unif_multinode_eyeQ1.sh EXP_NAME
# Cost: GPUs, steps and tokens stand in docs/launchers.md; the log tells the seconds of a step.
# Expected: PSNR on the fundus test set rises above the degraded input.
set -euo pipefail
CONFIG=configs/experiments/stage1_medq_unif_multinode_eyeQ1.yaml
source "$(dirname "${BASH_SOURCE[0]}")/lib/launch.sh"
