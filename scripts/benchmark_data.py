"""Benchmark mixed batches of a file of generated images: memory-mapped, or loaded into memory by `numpy.load`.

    python scripts/benchmark_data.py                     # 1,000,000 images: writes 3 GB into a temporary folder
    python scripts/benchmark_data.py --images 50000      # in seconds

Rows, each measured in separate processes, in turns, by the median of the rounds:

    in the page cache   `drelu_timm.data.generated`, the file was read before, by this training or another one
    on disk             the same, after the file was dropped from the page cache
    in memory           the arrays in memory; the first batch waits for `numpy.load` from the page cache

Columns: seconds from opening the file to the first batch; images/s of whole batches of 512, 70 % of them generated,
cropped, flipped and turned into float32; images/s of bare reads of as many generated images; and growth of anonymous
memory from before the file was opened: resident memory without the pages of files, which belong to the page cache that
all processes share and which the kernel reclaims when memory is short (Linux). Everything runs on one thread, as in
a worker. Images/s are by CPU time, including system calls and page faults, which other programs disturb less than
wall-clock time; those from the disk are by wall-clock time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from drelu_timm.data.augment import Augmentation
from drelu_timm.data.batches import TrainingBatches
from drelu_timm.data.generated import GeneratedImages
from drelu_timm.data.images import Images
from drelu_timm.runs import environment

ROWS = ("in the page cache", "on disk", "in memory")
COLUMNS = ("first batch (s)", "batches (images/s)", "bare reads (images/s)", "anonymous memory (MB)")
CLASSES, SIDE = 10, 32
BATCH_SIZE, FRACTION = 512, 0.7
SECONDS = 5.0  # length of each measurement of speed


class LoadedImages(GeneratedImages):
    """Reader of the same images in the same order from arrays in memory."""

    @classmethod
    def open(cls, paths: Sequence[Path], **options: Any) -> "LoadedImages":
        made = super().open(paths, **options)
        with np.load(paths[0]) as arrays:
            made.arrays = arrays["image"], arrays["label"]
        return made

    def read(self, index: np.ndarray) -> tuple[Tensor, Tensor]:
        if not hasattr(self, "arrays"):  # the digest is computed first
            return super().read(index)
        images, labels = self.arrays
        chosen = np.ascontiguousarray(images[index].transpose(0, 3, 1, 2))
        return torch.from_numpy(chosen), torch.from_numpy(labels[index])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000, help="images in the file, 3 kB each")
    parser.add_argument("--rounds", type=int, default=3, help="processes a row")
    parser.add_argument("--measure", nargs=2, metavar=("ROW", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        row, path = arguments.measure
        print(json.dumps(measure(row, Path(path))))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "generated.npz"
        write(path, arguments.images)
        figures: dict[str, list[dict[str, float]]] = {row: [] for row in ROWS}
        for _ in tqdm(range(arguments.rounds), desc="rounds"):
            for row in ROWS:
                figures[row].append(measured_apart(row, path))
    about = environment()
    versions = ", ".join(
        f"{name} {version}" for name, version in (about["versions"] | {"numpy": np.__version__}).items()
    )
    print(f"{arguments.images:,} images, {arguments.rounds} rounds; {about['hardware']}; {versions}\n")
    print(table(figures))


def write(path: Path, count: int) -> None:
    """Write a file of random images, sorted by class, as `numpy.savez` does but without holding it in memory."""
    generator = np.random.default_rng(0)
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, SIDE, SIDE, 3)}
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("image.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for start in tqdm(range(0, count, 10_000), desc="write", unit="0,000 images"):
                member.write(generator.bytes(min(10_000, count - start) * SIDE * SIDE * 3))
        with archive.open("label.npy", "w") as member:
            np.lib.format.write_array(member, np.sort(np.arange(count, dtype=np.int64) % CLASSES))


def measured_apart(row: str, path: Path) -> dict[str, float]:
    """Run `measure` in a new process."""
    command = [sys.executable, __file__, "--measure", row, str(path)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(row: str, path: Path) -> dict[str, float]:
    """Return the numbers of one row."""
    torch.set_num_threads(1)
    pixels = torch.randint(0, 256, (50_000, 3, SIDE, SIDE), dtype=torch.uint8)
    real = Images(pixels, torch.arange(50_000) % CLASSES, tuple("0123456789"), "Random")
    prepare(path, cached=row != "on disk")
    memory = anonymous_memory()
    start = time.perf_counter()
    kind = LoadedImages if row == "in memory" else GeneratedImages
    generated = kind.open([path], img_size=SIDE, in_chans=3, num_classes=CLASSES)
    batches = TrainingBatches(
        real,
        batch_size=BATCH_SIZE,
        seed=0,
        augmentation=Augmentation(crop_padding=4, flip=True),
        generated=generated,
        generated_fraction=FRACTION,
    )
    batches.batch(0, 0)
    first = time.perf_counter() - start
    count = round(BATCH_SIZE * FRACTION)
    draws = np.random.default_rng(0)
    clock = time.perf_counter if row == "on disk" else time.process_time
    whole = speed(lambda step: batches.batch(*divmod(step + 1, batches.steps_per_epoch)), BATCH_SIZE, clock)
    bare = speed(lambda _: generated.read(draws.integers(0, len(generated), count)), count, clock)
    return dict(zip(COLUMNS, (first, whole, bare, (anonymous_memory() - memory) / 1e6), strict=True))


def anonymous_memory() -> int:
    """Return the memory of this process in bytes, without pages of files."""
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared


def prepare(path: Path, *, cached: bool) -> None:
    """Read a file into the page cache, or drop it from there."""
    with path.open("rb") as file:
        if cached:
            while file.read(2**24):
                pass
        else:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def speed(make: Callable[[int], Any], images: int, clock: Callable[[], float]) -> float:
    """Return the images per second, by a clock, of a function that makes ``images`` images per call."""
    start, step = clock(), 0
    while (seconds := clock() - start) < SECONDS:
        make(step)
        step += 1
    return step * images / seconds


def table(figures: dict[str, list[dict[str, float]]]) -> str:
    """Return a Markdown table of the medians of every row."""
    lines = [["", *COLUMNS], ["---", *("---:" for _ in COLUMNS)]]
    for row, rounds in figures.items():
        first, *others = (median(each[column] for each in rounds) for column in COLUMNS)
        lines.append([row, f"{first:.2f}", *(f"{value:,.0f}" for value in others)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
