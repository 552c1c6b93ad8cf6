#!/usr/bin/env bash
# Purpose: the same long SSIM run with DeepSpeed ZeRO in place of FSDP.
# Command:
#   bash scripts/training/train_sft_stage1_medq_unif_multinode_sr_ssim_loss_v3_deepspeed.sh \
#     EXP_NAME
# Cost: GPUs, steps and tokens stand in docs/launchers.md; the log tells the seconds of a step.
# Expected: the losses of the FSDP run.
set -euo pipefail
CONFIG=configs/experiments/stage1_medq_unif_multinode_sr_ssim_loss_v3_deepspeed.yaml
source "$(dirname "${BASH_SOURCE[0]}")/lib/launch.sh"
