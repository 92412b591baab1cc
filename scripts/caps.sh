#!/usr/bin/env bash
# Make the curves of the caps in scripts/README.md (model_cards/caps.png): MNIST, the dense model, natural training, cap
# weight 0.1.
#
#   scripts/caps.sh [folder of MNIST; downloaded if missing]
#
# One run each, seed 0. The first is the paper's recipe, 113,670 steps (half an hour on one core). The others have 2,105
# steps (half a minute each).
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
