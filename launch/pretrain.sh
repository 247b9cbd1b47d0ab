#!/usr/bin/env bash
# Pre-training on a folder of photos, as the originals' main.sh: edit the values or set them outside, then run.
#   DIR=photos K=500 MODE=baseline launch/pretrain.sh [more flags of jaxclust.main]
set -euo pipefail
cd "$(dirname "$0")/.."

DIR=${DIR:-data/imagenet}   # folder of images, or of class folders, which only the evaluation looks at
ARCH=${ARCH:-alexnet}       # alexnet or vgg16
LR=${LR:-0.05}
WD=${WD:--5}                # the exponent: a decay of 10**WD
K=${K:-10000}
MODE=${MODE:-full}          # baseline (DeepCluster), fusion, uncertainty or full (UAD)
EXP=${EXP:-runs/pretrain}
PYTHON=${PYTHON:-.venv/bin/python}

exec "$PYTHON" -m jaxclust.main --config=configs/uad.py:imagenet --workdir="$EXP" \
    --config.data.source="folder:$DIR" --config.model.name="$ARCH" --config.cluster.k="$K" --config.uad.mode="$MODE" \
    --config.optimizer.body.lr="$LR" --config.optimizer.top.lr="$LR" \
    --config.optimizer.body.wd="$WD" --config.optimizer.top.wd="$WD" "$@"
