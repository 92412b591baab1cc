#!/usr/bin/env bash
# The caps' curves of scripts/README.md (model_cards/caps.png): MNIST, the dense net, balancer 0.1, natural training.
#
#   scripts/caps.sh [folder that holds MNIST, or that it is downloaded to]
#
# One run each, seed 0. The first is the paper's recipe, 113,670 steps: half an hour on one core; the others 2,105 steps,
# half a minute each.
set -euo pipefail
data=${1:-data}

train() {
    drelu-timm train --model dense_drelu --dataset mnist --data-dir "$data" --cap-weight 0.1 --output-dir "runs/caps/$1" --resume "${@:2}"
    drelu-timm evaluate "runs/caps/$1" --suite adaptive
}

train paper --preset paper-drelu --epochs 270
train own-rate --cap-lr 1 --epochs 5
train own-rate-and-more --cap-lr 0.3 --cap 10 --lr 5e-3 --schedule cosine --epochs 5
python scripts/cap_curves.py runs/caps/paper runs/caps/own-rate runs/caps/own-rate-and-more
