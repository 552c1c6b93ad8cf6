#!/usr/bin/env bash
# Starts the experiment of the launcher that sources this file with CONFIG (its YAML) set.
# Usage, variables and values: docs/launchers.md.
#
#   bash scripts/training/LAUNCHER.sh EXP_NAME [NUM_GPUS [MASTER_PORT [NUM_NODES]]] [-- --name value ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."

fail() {
  echo "error: $*" >&2
  exit 2
}

positional=()
while (($#)) && [[ $1 != -- ]]; do
  [[ $1 != -* ]] || fail "$1: arguments of the trainer come after --"
  positional+=("$1")
  shift
done
extra=("${@:2}") # without the --
((${#positional[@]} >= 1 && ${#positional[@]} <= 4)) ||
  fail "usage: $0 EXP_NAME [NUM_GPUS [MASTER_PORT [NUM_NODES]]] [-- --name value ...]"
name=${positional[0]}
[[ $name =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] ||
  fail "EXP_NAME='$name' names a folder: letters, digits, '.', '_' and '-' only"
[[ -f $CONFIG ]] || fail "CONFIG=$CONFIG: there is no such file below $PWD"

gpus=${PROC_PER_NODE:-${positional[1]:-${DEFAULT_GPUS:-8}}}
port=${positional[2]:-${MASTER_PORT:-23456}}
nodes=${NODE_COUNT:-${positional[3]:-1}}
if [[ ${DEVICE:-} != cpu && -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
  IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES"
  ((${#visible[@]})) || fail "CUDA_VISIBLE_DEVICES is empty: list GPUs or set DEVICE=cpu"
  if [[ ${#visible[@]} != "$gpus" ]]; then
    echo "WARNING: CUDA_VISIBLE_DEVICES lists ${#visible[@]} GPUs, which overrides $gpus" >&2
    gpus=${#visible[@]}
  fi
fi
[[ $gpus =~ ^[1-9][0-9]*$ ]] || fail "NUM_GPUS or PROC_PER_NODE=$gpus is no number of processes"
[[ $port =~ ^[1-9][0-9]{0,4}$ ]] && ((port < 65536)) || fail "MASTER_PORT=$port is no port"
[[ $nodes =~ ^[1-9][0-9]*$ ]] || fail "NUM_NODES or NODE_COUNT=$nodes is no number of nodes"
if ((nodes > 1)); then
  for variable in NODE_RANK MASTER_ADDR; do
    [[ -n ${!variable:-} ]] || fail "$variable is not set: a run on $nodes nodes needs NODE_RANK" \
      "(from 0 on, another on every node) and MASTER_ADDR (host of node 0, the same on all)"
  done
fi
rank=${NODE_RANK:-0}
[[ $rank =~ ^(0|[1-9][0-9]*)$ ]] && ((rank < nodes)) ||
  fail "NODE_RANK=$rank is none of the nodes: NODE_COUNT=$nodes"

run=${CHECKPOINT_DIR:-results/$name}
if [[ -e $run/training_args.json ]]; then
  owner=$(sed -n 's/^  "config": "\(.*\)",$/\1/p' "$run/training_args.json")
  [[ $owner == "$CONFIG" ]] || fail "$run is the run folder of ${owner:-a run without --config}," \
    "not of $CONFIG: choose another EXP_NAME or CHECKPOINT_DIR"
fi

trainer=(--config "$CONFIG" --checkpoint_dir "$run" --wandb_name "$name")
for pair in model_path=MODEL_PATH data_root=DATA_ROOT dataset_config_file=DATASET_CONFIG \
  resume_from=START_FROM device=DEVICE backend=BACKEND; do
  variable=${pair#*=}
  [[ -z ${!variable:-} ]] || trainer+=("--${pair%=*}" "${!variable}")
done

command=(env "NCCL_DEBUG=${NCCL_DEBUG:-WARN}"
  "TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
  "${PYTHON:-python}" scripts/training/lib/torchrun.py
  --nnodes "$nodes" --node_rank "$rank" --nproc_per_node "$gpus"
  --master_addr "${MASTER_ADDR:-localhost}" --master_port "$port"
  train/main_sr_pixel_loss.py "${trainer[@]}" "${extra[@]}")
printf -v shown '%q ' "${command[@]}"
echo "${shown% }"
[[ ${DRY_RUN:-0} == 0 ]] || exit 0
exec "${command[@]}"
