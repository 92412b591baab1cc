"""Trained models under the names that timm and RobustBench look for, and where they come from."""
