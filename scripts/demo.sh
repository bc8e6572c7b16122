#!/usr/bin/env bash
# The main job on the embedded data set: bash scripts/demo.sh [WORKDIR]
# Installs, draws Context Shapes, trains FPT Mask R-CNN from scratch, evaluates, draws detections.
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
echo "pictures: $workdir/predictions/contact_sheet.png    metrics: $workdir/metrics.jsonl    TensorBoard: --logdir $workdir"
