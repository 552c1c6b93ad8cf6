#!/usr/bin/env bash
# Purpose: an experiment of your own as one node of a cluster job, which must say so.
# Command:
#   CONFIG=EXPERIMENT.yaml bash scripts/training/train_sft_generic_clma.sh EXP_NAME
# Cost: GPUs, steps and tokens are those of your file; the log tells the seconds of a step.
# Expected: what its YAML file is made for.
set -euo pipefail
CONFIG=${CONFIG:?CONFIG is not set: the YAML file of your experiment, extending a file of configs/experiments}
: "${NODE_COUNT:?NODE_COUNT is not set: the number of nodes of the job}"
: "${NODE_RANK:?NODE_RANK is not set: the number of this node, from 0 on}"
: "${MASTER_ADDR:?MASTER_ADDR is not set: the host name of node 0}"
source "$(dirname "${BASH_SOURCE[0]}")/lib/launch.sh"
