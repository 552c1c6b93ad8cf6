#!/usr/bin/env bash
# Purpose: an experiment of your own, as a YAML file.
# Command:
#   CONFIG=EXPERIMENT.yaml bash scripts/training/train_sft_generic.sh EXP_NAME
# Cost: GPUs, steps and tokens are those of your file; the log tells the seconds of a step.
# Expected: what its YAML file is made for.
set -euo pipefail
CONFIG=${CONFIG:?CONFIG is not set: the YAML file of your experiment, extending a file of configs/experiments}
source "$(dirname "${BASH_SOURCE[0]}")/lib/launch.sh"
