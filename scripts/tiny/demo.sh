#!/usr/bin/env bash
# The main job on real images: pairs, restore, fine-tune with the v3 SSIM preset, restore again.
#   bash scripts/tiny/demo.sh [OUT]
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-build/demo}
rm -rf "$out"
# One thread: the tensors are so small that a second one only waits.
export OMP_NUM_THREADS=1

restore() {
  python inference_pipeline/MedQ-Uni_run_batch_test2.py --model_path "$1" --output_dir "$2" \
    --annotation_file "$out/data/test.jsonl" --image_root "$out/data" \
    --num_timesteps "$NUM_TIMESTEPS" --max_text_tokens 32
}
NUM_TIMESTEPS=2

python -m scripts.tiny.make_pairs --out "$out/data"
restore configs/tiny/checkpoint "$out/before"
python train/main_sr_pixel_loss.py --config configs/tiny/demo.yaml \
  --dataset_config_file "$out/data/mixture.yaml" --checkpoint_dir "$out/run"
restore "$(find "$out/run" -maxdepth 1 -name '[0-9]*' | sort | tail -n 1)" "$out/after"
python -m scripts.tiny.report --demo "$out"
python -m inference_pipeline.report "$out/before" "$out/after" --output "$out/report.html"
