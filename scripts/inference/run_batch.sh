#!/usr/bin/env bash
# Checkpoints x test sets on the GPUs of this machine, then the tables and the report.
#
#   CHECKPOINTS="runs/a/0002000 runs/a/0004000" ANNOTATION_FILES="sets/ct.jsonl sets/mri.jsonl" \
#     IMAGE_ROOT=sets BASE_OUTPUT_DIR=results GPUS=8 bash scripts/inference/run_batch.sh [--option value ...]
#
# Options are those of MedQ-Uni_run_batch_test2.py. GPUS=0 runs on the CPU. DRY_RUN=1 prints the command.
# Killed, the same line goes on where it was.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

for variable in CHECKPOINTS ANNOTATION_FILES IMAGE_ROOT BASE_OUTPUT_DIR; do
  [[ -n ${!variable:-} ]] || { echo "error: $variable is not set" >&2; exit 2; }
done
read -ra checkpoints <<<"$CHECKPOINTS"
read -ra sets <<<"$ANNOTATION_FILES"
gpus=${GPUS:-1}
[[ $gpus =~ ^[0-9]+$ ]] || { echo "error: GPUS=$gpus is no number" >&2; exit 2; }

start=(python)
((gpus < 2)) || start=(python -m torch.distributed.run --standalone --nproc_per_node "$gpus")
command=("${start[@]}" inference_pipeline/MedQ-Uni_run_batch_test2.py
  --model_path "${checkpoints[@]}" --annotation_file "${sets[@]}"
  --image_root "$IMAGE_ROOT" --output_dir "$BASE_OUTPUT_DIR")
((gpus)) || command+=(--target_gpu_device cpu)
command+=("$@")
if [[ ${DRY_RUN:-0} == 1 ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
stamp=$(mktemp)
trap 'rm -f "$stamp"' EXIT
status=0
"${command[@]}" || status=$?
# Failed samples are shown in the report; a run that came to no result has nothing to show.
[[ -n $(find "$BASE_OUTPUT_DIR" -name statistics.json -newer "$stamp" -print -quit) ]] || exit "$status"
python inference_pipeline/parse_statistics_to_csv.py -d "$BASE_OUTPUT_DIR" -o "$BASE_OUTPUT_DIR/summary.csv"
python -m inference_pipeline.report "$BASE_OUTPUT_DIR" --output "$BASE_OUTPUT_DIR/report.html"
exit "$status"
