"""Randomness without a state: every number is a function of a seed and a key, such as (epoch, step).

So what is drawn depends neither on what was drawn before nor on who asks: a resumed run, or one on more processes, gets
the same numbers.
"""

import numpy as np
import torch

from .errors import InputError


def random_bits(count: int, seed: int, *key: int) -> np.ndarray:
    """``count`` random uint64 of (seed, key), the same with every version of NumPy (its NEP 19)."""
    if seed < 0:
        raise InputError(f"--seed {seed} is not possible; give an integer >= 0")
    return np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)).random_raw(count)


def uniform(bits: np.ndarray) -> np.ndarray:
    """Random uint64 as float64 in [0, 1), of the shape of ``bits``."""
    return (bits >> np.uint64(11)) * 2.0**-53


def permutation(count: int, seed: int, *key: int) -> np.ndarray:
    """Return a random order of ``range(count)``, int64, the same with every version of NumPy."""
    return np.argsort(random_bits(count, seed, *key), kind="stable")


def random_generator(seed: int, *key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by (seed, key); another kind of device draws other numbers."""
    (state,) = np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))
