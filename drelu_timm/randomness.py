"""Random numbers that are a function of a seed and a key, such as (epoch, step).

They do not depend on what was drawn before, so a resumed run, or one with another number of processes, draws the same.
"""

import numpy as np
import torch

from .errors import InputError


def random_bits(count: int, seed: int, *key: int) -> np.ndarray:
    """Return ``count`` random uint64; they are the same in every version of NumPy (NEP 19).

    Raises:
        InputError: A negative seed.
    """
    if seed < 0:
        raise InputError(f"--seed {seed} is negative. Use an integer of at least 0.")
    return np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)).random_raw(count)


def uniform(bits: np.ndarray) -> np.ndarray:
    """Convert random uint64 to float64 in [0, 1), of the same shape."""
    return (bits >> np.uint64(11)) * 2.0**-53


def permutation(count: int, seed: int, *key: int) -> np.ndarray:
    """Return a random permutation of ``range(count)``, int64; it is the same in every version of NumPy."""
    return np.argsort(random_bits(count, seed, *key), kind="stable")


def random_generator(seed: int, *key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator seeded by (seed, key). Other types of devices draw other numbers from it."""
    (state,) = np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))
