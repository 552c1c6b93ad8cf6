#!/usr/bin/env bash
# Which pixel-space loss restores better? Every setting with every seed, equal steps, from the
# shipped checkpoint, on degradations that it has not seen; then the table and the plots.
#   bash scripts/experiments/compare_losses.sh [OUT] [JOBS]
set -euo pipefail
cd "$(dirname "$0")/../.."
export OUT=${1:-build/compare} OMP_NUM_THREADS=1
jobs=${2:-2}
seeds="1 2 3"
export STEPS=150

declare -A settings=(
  [none]="base"
  [pixel_l2]="pixel_small"
  [ssim_v3]="ssim_v3"
  [ssim_v3_low_t]="ssim_v3 --pixel_space_t_fraction=0.25"
  [ssim_v3_balance]="ssim_v3 --pixel_space_t_fraction=0.25 --pixel_space_balance=0.3"
  [mixed]="mixed"
  [ssim_v1]="ssim_v1"
)

# run NAME SEED PRESET [ARGUMENTS]: fine-tune, then restore the held-out slices in 1 and 10 steps.
run() {
  local name=$1 seed=$2 preset=$3 folder=$OUT/$1/$2
  shift 3
  python train/main_sr_pixel_loss.py --config "configs/experiments/$preset.yaml" "$@" \
    --bf16 False --activation_checkpointing False \
    --model_path configs/tiny/checkpoint --dataset_config_file "$OUT/data/mixture.yaml" \
    --checkpoint_dir "$folder/run" --global_seed "$seed" --data_seed "$seed" \
    --total_steps "$STEPS" --save_every "$STEPS" --log_every 10 --warmup_steps 20 --lr 3e-4 \
    --lr_scheduler cosine --min_lr 3e-6 --ema 0.97 --full_noise_fraction 0.25 \
    --expected_num_tokens 1600 --max_num_tokens 2400 --max_num_tokens_per_sample 1024
  for timesteps in 2 11; do
    python inference_pipeline/MedQ-Uni_run_batch_test2.py \
      --model_path "$(find "$folder/run" -maxdepth 1 -name '[0-9]*')" \
      --output_dir "$folder/restored_$timesteps" --annotation_file "$OUT/data/test.jsonl" \
      --image_root "$OUT/data" --num_timesteps "$timesteps" --max_text_tokens 32
  done
}
export -f run

[[ ! -e $OUT ]] || { echo "error: $OUT exists: remove it or name another folder" >&2; exit 1; }
python -m scripts.tiny.make_pairs --out "$OUT/data" --train 600 --sigma 0.2 --factor 8
for seed in $seeds; do
  for name in "${!settings[@]}"; do
    echo "$name $seed ${settings[$name]}"
  done
done | xargs -P "$jobs" -I{} bash -c 'set -- {}; mkdir -p $OUT/$1; run "$@" >"$OUT/$1/$2.log" 2>&1'
python -m scripts.experiments.compare_losses --out "$OUT"
