"""Trained models under the names that timm and RobustBench look for, and the Hugging Face Hub."""

import timm  # noqa: F401  (before any module here, as in `models`)
