"""Attacks: threat models, published attacks, adaptive attacks, and suites of them."""
