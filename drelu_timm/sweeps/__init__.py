"""Grids of trainings and evaluations: their cells, and the executors and the scheduler that run them."""
