#!/usr/bin/env bash
# Does it stay sound? 4,000 steps of the conservative preset with a low-t share, and of the first
# SSIM run's settings; the held-out slices are restored after every 1,000 steps.
#   bash scripts/experiments/stability.sh [OUT]
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-build/stability}
export OMP_NUM_THREADS=1

run() {
  local name=$1 preset=$2 folder=$out/$1
  shift 2
  python train/main_sr_pixel_loss.py --config "configs/experiments/$preset.yaml" "$@" \
    --bf16 False --activation_checkpointing False \
    --model_path configs/tiny/checkpoint --dataset_config_file "$out/data/mixture.yaml" \
    --checkpoint_dir "$folder/run" --total_steps 4000 --save_every 1000 --log_every 50 \
    --warmup_steps 50 --lr 3e-4 --ema 0.99 --full_noise_fraction 0.25 \
    --expected_num_tokens 800 --max_num_tokens 1600 --max_num_tokens_per_sample 1024
  for checkpoint in "$folder"/run/0*; do
    for timesteps in 2 11; do
      python inference_pipeline/MedQ-Uni_run_batch_test2.py --model_path "$checkpoint" \
        --output_dir "$folder/restored_${timesteps}_$(basename "$checkpoint")" \
        --annotation_file "$out/data/test.jsonl" --image_root "$out/data" \
        --num_timesteps "$timesteps" --max_text_tokens 32
    done
  done
}

[[ ! -e $out ]] || { echo "error: $out exists: remove it or name another folder" >&2; exit 1; }
python -m scripts.tiny.make_pairs --out "$out/data" --train 2000 --sigma 0.2 --factor 8
run ssim_v3_low_t ssim_v3 --pixel_space_t_fraction=0.25
run ssim_v1 ssim_v1
python -m scripts.experiments.compare_losses --out "$out" --stability
