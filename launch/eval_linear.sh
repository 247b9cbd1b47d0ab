#!/usr/bin/env bash
# Linear probes on a finished run, as the originals' eval_linear.sh: edit the values or set them outside, then run.
#   EXP=runs/pretrain CONV=conv5 launch/eval_linear.sh [more flags of jaxclust.main]
set -euo pipefail
cd "$(dirname "$0")/.."

EXP=${EXP:-runs/pretrain}   # the run whose network is judged, on the images that it was trained on
CONV=${CONV:-conv1,conv2,conv3,conv4,conv5}
WD=${WD:--7}                # the exponent: a decay of 10**WD
TENCROPS=${TENCROPS:-True}
PYTHON=${PYTHON:-.venv/bin/python}

exec "$PYTHON" -m jaxclust.main --job=evaluate --workdir="$EXP" --config.evaluate.suite=linear \
    --config.evaluate.linear.layers="$CONV" --config.evaluate.linear.wd="$WD" \
    --config.evaluate.linear.ten_crops="$TENCROPS" "$@"
