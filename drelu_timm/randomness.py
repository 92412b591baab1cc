"""Randomness without a state: every number is a function of a seed and a key, such as (epoch, step).

So what is drawn depends neither on what was drawn before nor on who asks: a resumed run, or one on more processes, gets
the same numbers.
"""

import numpy as np
import torch
from numpy.typing import ArrayLike

from .errors import InputError

_ROUNDS = 16  # with 8, some orders of 5 came noticeably more often than others
_PERMUTED = 2**32 - 1  # a key that nobody counts up to


def random_bits(count: int, seed: int, *key: int) -> np.ndarray:
    """``count`` random uint64 of (seed, key), the same with every version of NumPy (its NEP 19)."""
    if seed < 0:
        raise InputError(f"--seed {seed} is not possible; give an integer >= 0")
    return np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)).random_raw(count)


def uniform(bits: np.ndarray) -> np.ndarray:
    """Random uint64 as float64 in [0, 1), of the shape of ``bits``."""
    return (bits >> np.uint64(11)) * 2.0**-53


def permutation(count: int, seed: int, *key: int) -> np.ndarray:
    """A random order of ``range(count)``, int64."""
    return np.argsort(random_bits(count, seed, *key), kind="stable")


def permuted(index: ArrayLike, count: ArrayLike, seed: int, *key: ArrayLike) -> np.ndarray:
    """Where a random permutation of ``range(count)`` takes ``index``, without a table of it.

    A Feistel network on a rectangle of at least ``count`` cells, walked until it is back among the first ``count``:
    generalised-Feistel cipher and cycle walking of Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002,
    https://web.cs.ucdavis.edu/~rogaway/papers/subset.pdf.

    Args:
        index: Integers in 0 to ``count - 1``, of any shape.
        count: At least 1; one for all, or one an index.
        seed: Integer >= 0.
        key: Integers >= 0, each one for all or one an index; another key is another permutation.

    Returns:
        int64, of the shape that ``index``, ``count`` and ``key`` broadcast to.
    """
    arrays = np.broadcast_arrays(*(np.asarray(each, dtype=np.uint64) for each in (index, count, *key)))
    cell, count, *parts = (each.ravel() for each in arrays)
    keys = random_bits(_ROUNDS, seed, _PERMUTED)[:, None]  # [rounds, 1], and one an index below
    for part in parts:
        keys = _hashed(keys + part)
    keys = np.broadcast_to(keys, (_ROUNDS, cell.size))
    rows = np.ceil(np.sqrt(count)).astype(np.uint64)
    columns = (count + rows - np.uint64(1)) // rows
    cell = _network(cell, rows, columns, keys)
    while (outside := np.flatnonzero(cell >= count)).size:
        cell[outside] = _network(cell[outside], rows[outside], columns[outside], keys[:, outside])
    return cell.astype(np.int64).reshape(arrays[0].shape)


def _network(cell: np.ndarray, rows: np.ndarray, columns: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """A keyed bijection of the cells of a rectangle, all uint64: each round shifts a row or a column of it."""
    row, column = np.divmod(cell, columns)
    for even, odd in zip(keys[::2], keys[1::2], strict=True):
        row = (row + _hashed(column ^ even) % rows) % rows
        column = (column + _hashed(row ^ odd) % columns) % columns
    return row * columns + column


def _hashed(values: np.ndarray) -> np.ndarray:
    """uint64 whose every bit depends on every bit of ``values``: the finaliser of SplitMix64.

    Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014, https://doi.org/10.1145/2660193.2660195.
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def random_generator(seed: int, *key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by (seed, key); another kind of device draws other numbers."""
    (state,) = np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))
