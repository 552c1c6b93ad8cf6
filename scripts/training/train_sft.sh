#!/usr/bin/env bash
# Purpose: fine-tuning of UniMedVL on your own pairs (DATASET_CONFIG: your mixture).
# Command:
#   DATASET_CONFIG=MIXTURE.yaml bash scripts/training/train_sft.sh EXP_NAME
# Cost: GPUs, steps and tokens stand in docs/launchers.md; the log tells the seconds of a step.
# Expected: ce and mse fall.
set -euo pipefail
CONFIG=configs/experiments/sft.yaml
source "$(dirname "${BASH_SOURCE[0]}")/lib/launch.sh"
