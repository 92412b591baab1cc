#!/usr/bin/env bash
# DreluTimm2026_shallow_cnn_drelu_trades_eps01: TRADES on MNIST, evaluated for Linf, eps 0.1.
#
# Clean 100.00 %, AutoAttack 95.50 %, worst case over all attacks 95.50 %, gradient masking: sound. Preliminary:
# measured on the first 200 of the 10,000 test images of MNIST.
# 1 run, seed 0; the figures are those of seed 0.
# Training: 8 min for the last of its 2 trainings; python 3.11.7, drelu-timm 0.1.0, torch 2.15.0, timm 1.0.9, accelerate
# 1.15.0, pyautoattack 0.2.0, foolbox 3.3.4, robustbench 1.1.1, this repository at
# 10b2efdf4b6debee8a088d381e261603e6aad3a3 on 2 x AMD EPYC.
# Evaluation: 9 min; python 3.11.7, drelu-timm 0.1.0, torch 2.15.0, timm 1.0.9, accelerate 1.15.0, pyautoattack 0.2.0,
# foolbox 3.3.4, robustbench 1.1.1, this repository at 10b2efdf4b6debee8a088d381e261603e6aad3a3 on 2 x AMD EPYC.
set -euo pipefail

for seed in 0; do
    accelerate launch --num_processes 1 --cpu --mixed_precision bf16 -m drelu_timm train \
        --model shallow_cnn_drelu \
        --dataset mnist \
        --seed $seed \
        --norm Linf \
        --eps 0.1 \
        --step-size 0.025 \
        --cap-weight 0.01 \
        --epochs 3 \
        --monitor loss \
        --output-dir runs/DreluTimm2026_shallow_cnn_drelu_trades_eps01/seed$seed-start
    accelerate launch --num_processes 1 --cpu --mixed_precision bf16 -m drelu_timm train \
        --model shallow_cnn_drelu \
        --dataset mnist \
        --seed $seed \
        --objective trades \
        --norm Linf \
        --eps 0.1 \
        --step-size 0.025 \
        --cap-weight 0.01 \
        --epochs 3 \
        --monitor pgd \
        --init-from runs/DreluTimm2026_shallow_cnn_drelu_trades_eps01/seed$seed-start \
        --output-dir runs/DreluTimm2026_shallow_cnn_drelu_trades_eps01/seed$seed
    drelu-timm evaluate runs/DreluTimm2026_shallow_cnn_drelu_trades_eps01/seed$seed --suite standard --n-examples 200
done
drelu-timm export runs/DreluTimm2026_shallow_cnn_drelu_trades_eps01/seed0 --key DreluTimm2026_shallow_cnn_drelu_trades_eps01 --title 'D-ReLU variants of timm classifiers, measured under AutoAttack and adaptive attacks' --authors 'The drelu_timm developers' --link https://doi.org/10.3390/math12223551 --venue N/A
