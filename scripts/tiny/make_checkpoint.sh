#!/usr/bin/env bash
# Re-creates the tiny checkpoint from nothing: autoencoder, data, initial folder, pretraining.
#   bash scripts/tiny/make_checkpoint.sh [OUT]
set -euo pipefail
cd "$(dirname "$0")/../.."
build=build/tiny
out=${1:-build/tiny/checkpoint}

python -m scripts.tiny.train_vae --out "$build/vae"
python -m scripts.tiny.make_pairs --out "$build/pairs" --train 6000 --others 0.08 --varied --seed 0
python -m scripts.tiny.init --vae "$build/vae" --out "$build/init"
# One thread: the tensors are so small that a second one only waits.
OMP_NUM_THREADS=1 python train/main_sr_pixel_loss.py --config configs/tiny/pretrain.yaml \
  --model_path "$build/init" --dataset_config_file "$build/pairs/mixture.yaml" \
  --checkpoint_dir "$build/run"
last=$(find "$build/run" -maxdepth 1 -name '[0-9]*' | sort | tail -n 1)
python -m scripts.tools.export --checkpoint "$last" --out "$out" --dtype bfloat16
echo "the tiny checkpoint is in $out"
