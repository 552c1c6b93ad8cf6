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

# As the tiny model was trained: its held-out slices, 2 mm pixels, its noise and factor, its texts.
volume=$(python -c 'from scripts.tiny.images import ICBM152; print(ICBM152)')
python scripts/tools/make_pairs.py "$volume" --out "$out/data" --test_slices 92 120 --val 0 \
  --every 2 --spacing 2 --size 112 96 --image_rule 8 112 96 --vit_rule 14 112 98 \
  --degrade mri_noise:0.4 --texts mri_noise "Remove the noise." "Moderate noise." \
  --degrade downsampling:0.5 \
  --texts downsampling "Increase the resolution." "Low resolution, factor four."
restore configs/tiny/checkpoint "$out/before"
python train/main_sr_pixel_loss.py --config configs/tiny/demo.yaml \
  --dataset_config_file "$out/data/mixture.yaml" --checkpoint_dir "$out/run"
restore "$(find "$out/run" -maxdepth 1 -name '[0-9]*' | sort | tail -n 1)" "$out/after"
python -m scripts.tiny.report --demo "$out"
python -m inference_pipeline.report "$out/before" "$out/after" --output "$out/report.html"
