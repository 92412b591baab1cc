#!/usr/bin/env bash
# DreluTimm2026_shallow_cnn_drelu_natural_eps01: natural training on MNIST, evaluated for Linf, eps 0.1.
#
# Clean 99.50 %, AutoAttack 88.00 %, worst case over all attacks 62.00 %, gradient masking: masked. Preliminary:
# measured on the first 200 of the 10,000 test images of MNIST.
# 1 run, seed 0; the figures are those of seed 0.
# Training: 5 min; python 3.11.7, drelu-timm 0.1.0, torch 2.15.0, timm 1.0.9, accelerate 1.15.0, pyautoattack 0.2.0,
# foolbox 3.3.4, robustbench 1.1.1, this repository at 8670e3d107d6f60f721662f60799654fa6de45c1 on 2 x AMD EPYC.
# Evaluation: 19 min; python 3.11.7, drelu-timm 0.1.0, torch 2.15.0, timm 1.0.9, accelerate 1.15.0, pyautoattack 0.2.0,
# foolbox 3.3.4, robustbench 1.1.1, this repository at 37aa023121fff3958d51b11df3ac976625c5763a on 2 x AMD EPYC.
set -euo pipefail

for seed in 0; do
    accelerate launch --num_processes 1 --cpu --mixed_precision bf16 -m drelu_timm train \
        --model shallow_cnn_drelu \
        --dataset mnist \
        --norm Linf \
        --eps 0.1 \
        --step-size 0.025 \
        --cap 10.0 \
        --cap-weight 0.1 \
        --cap-lr 0.02 \
        --lr 0.005 \
        --schedule cosine \
        --monitor loss \
        --seed $seed \
        --output-dir runs/DreluTimm2026_shallow_cnn_drelu_natural_eps01/seed$seed
    drelu-timm evaluate runs/DreluTimm2026_shallow_cnn_drelu_natural_eps01/seed$seed --suite all --n-examples 200
done
drelu-timm export runs/DreluTimm2026_shallow_cnn_drelu_natural_eps01/seed0 --key DreluTimm2026_shallow_cnn_drelu_natural_eps01 --title 'D-ReLU variants of timm classifiers, measured under AutoAttack and adaptive attacks' --authors 'The drelu_timm developers' --link https://doi.org/10.3390/math12223551 --venue N/A --as-masked
