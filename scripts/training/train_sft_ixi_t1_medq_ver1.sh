#!/usr/bin/env bash
# Purpose: a trial run on one set of MRI slices, from data to checkpoint.
# Command:
#   bash scripts/training/train_sft_ixi_t1_medq_ver1.sh EXP_NAME
# Cost: GPUs, steps and tokens stand in docs/launchers.md; the log tells the seconds of a step.
# Expected: step folders that restore; losses of the first lines near those of the base model.
set -euo pipefail
CONFIG=configs/experiments/ixi_t1_medq_ver1.yaml
DEFAULT_GPUS=4
source "$(dirname "${BASH_SOURCE[0]}")/lib/launch.sh"
