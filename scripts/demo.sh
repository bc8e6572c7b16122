#!/usr/bin/env bash
# Trains FPT Mask R-CNN from scratch on the embedded data set: bash scripts/demo.sh [WORKDIR]
# Installs the requirements, generates Context Shapes, trains, evaluates and draws detections.
set -euo pipefail

workdir="$(realpath -m "${1:-/tmp/fpt_jax_demo}")"
source "$(dirname "$0")/_environment.sh"
use_environment requirements.txt

config=configs/coco_mask.py:demo
data="--config.data.data_dir=$workdir/data"
"$python" -m fpt_jax.main --mode=prepare --config=$config "$data"
"$python" -m fpt_jax.main --mode=train --config=$config "$data" --workdir="$workdir"
"$python" -m fpt_jax.main --mode=predict --config=$config "$data" --workdir="$workdir" \
  --config.data.eval_split='val[:12]'
echo "pictures: $workdir/predictions/contact_sheet.png"
echo "metrics: $workdir/metrics.jsonl"
echo "TensorBoard: tensorboard --logdir $workdir"
