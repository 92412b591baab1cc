#!/usr/bin/env bash
# DreluTimm2026_strided_relu_at_eps8: adversarial training on CIFAR-10 (JPEG copy), evaluated for Linf, eps 8/255.
#
# Clean 52.10 %, AutoAttack 26.30 %, worst case over all attacks 26.30 %, gradient masking: sound. Preliminary: measured
# on the first 1,000 of the 10,000 test images of CIFAR-10 (JPEG copy).
# 1 run, seed 0; the figures are those of seed 0.
# CIFAR-10 (JPEG copy) is not what a training finds or downloads by itself: give each its folder by --data-dir.
# Training: 20 min for the last of its 2 trainings; python 3.11.7, drelu-timm 0.1.0, torch 2.15.0, timm 1.0.9,
# accelerate 1.15.0, pyautoattack 0.2.0, foolbox 3.3.4, robustbench 1.1.1, this repository at
# 10b2efdf4b6debee8a088d381e261603e6aad3a3 on 2 x AMD EPYC.
# Evaluation: 3 min; python 3.11.7, drelu-timm 0.1.0, torch 2.15.0, timm 1.0.9, accelerate 1.15.0, pyautoattack 0.2.0,
# foolbox 3.3.4, robustbench 1.1.1, this repository at 10b2efdf4b6debee8a088d381e261603e6aad3a3 on 2 x AMD EPYC.
set -euo pipefail

for seed in 0; do
    accelerate launch --num_processes 1 --cpu --mixed_precision bf16 -m drelu_timm train \
        --model strided_cnn_drelu \
        --dataset cifar10 \
        --seed $seed \
        --norm Linf \
        --eps 8/255 \
        --step-size 0.00784313725490196 \
        --activation relu \
        --epochs 3 \
        --monitor loss \
        --output-dir runs/DreluTimm2026_strided_relu_at_eps8/seed$seed-start
    accelerate launch --num_processes 1 --cpu --mixed_precision bf16 -m drelu_timm train \
        --model strided_cnn_drelu \
        --dataset cifar10 \
        --seed $seed \
        --objective at \
        --norm Linf \
        --eps 8/255 \
        --steps 5 \
        --step-size 0.0098 \
        --activation relu \
        --schedule cosine \
        --ema-decay 0.995 \
        --epochs 20 \
        --monitor pgd \
        --init-from runs/DreluTimm2026_strided_relu_at_eps8/seed$seed-start \
        --output-dir runs/DreluTimm2026_strided_relu_at_eps8/seed$seed
    drelu-timm evaluate runs/DreluTimm2026_strided_relu_at_eps8/seed$seed --suite standard --n-examples 1000
done
drelu-timm evaluate runs/DreluTimm2026_strided_relu_at_eps8/seed0 --norm Linf --eps 0,2/255,4/255,8/255,12/255,16/255 --suite quick --n-examples 500
drelu-timm export runs/DreluTimm2026_strided_relu_at_eps8/seed0 --key DreluTimm2026_strided_relu_at_eps8 --title 'D-ReLU variants of timm classifiers, measured under AutoAttack and adaptive attacks' --authors 'The drelu_timm developers' --link https://doi.org/10.3390/math12223551 --venue N/A
