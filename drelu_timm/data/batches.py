"""Training batches of real and generated images, each a function of (seed, epoch, step) only."""

import signal
from collections.abc import Iterable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from ..errors import InputError
from ..randomness import permutation, random_bits
from .augment import BITS, Augmentation, augment, cutmix, cutmix_box
from .generated import GeneratedImages
from .images import Images, to_float

# Last part of the keys for numbers that are drawn once per batch, in addition to the bits of its images.
_BOX, _PARTNERS = 1, 2


class TrainingBatches:
    """Shuffled and augmented batches, each a function of (seed, epoch, step) only.

    Therefore all numbers of processes and workers give the same batches, of which each process sees its own part, and
    a resumed training continues with the same batches as one that was not stopped.

    Every pass over the real images has another order; the images that do not fill its last batch are left out, other
    ones in every pass. `GeneratedImages.drawn` is the order of generated images. An epoch has as many batches as the
    real images fill, with or without generated ones: "the overall size of the training dataset remains constant"
    (section 8 of the paper, which follows Wang et al., "Better Diffusion Models Further Improve Adversarial Training",
    ICML 2023, https://arxiv.org/abs/2302.04638).

    Args:
        images: Real training set. Batches are made on its device; workers need it on the CPU.
        batch_size: Images per batch, over all processes.
        seed: Integer >= 0.
        augmentation: Augmentation of the images.
        generated: Generated images to mix in.
        generated_fraction: Share of generated images in every batch, rounded to whole images; at least 0, below 1.

    Attributes:
        steps_per_epoch: Number of batches per epoch.

    Raises:
        InputError: Fewer images than a batch needs, or a value that is not allowed.
    """

    def __init__(
        self,
        images: Images,
        *,
        batch_size: int,
        seed: int,
        augmentation: Augmentation = Augmentation(),  # noqa: B008  (frozen)
        generated: GeneratedImages | None = None,
        generated_fraction: float = 0.0,
    ):
        if not 1 <= batch_size <= len(images):
            raise InputError(
                f"--batch-size {batch_size} is not possible with {len(images)} training images. Use 1 to {len(images)}."
            )
        self.images = images
        self.batch_size = batch_size
        self.seed = seed
        self.augmentation = augmentation
        self.generated = generated
        self.steps_per_epoch = len(images) // batch_size
        self._n_generated = _n_generated(generated, generated_fraction, batch_size)
        # Spread evenly, so that the part of every process, which its BatchNorm sees, has the same share.
        before = np.arange(batch_size + 1) * self._n_generated // batch_size
        self._is_generated = np.diff(before) == 1
        self._rank = np.where(
            self._is_generated, before[:-1], np.arange(batch_size) - before[:-1]
        )  # among images of its kind
        self._pass, self._order = 0, permutation(len(images), seed, 0)

    def batch(self, epoch: int, step: int, process_index: int = 0, num_processes: int = 1) -> tuple[Tensor, Tensor]:
        """Return a process's part of a batch.

        Args:
            epoch: From 0.
            step: From 0 to ``steps_per_epoch - 1``.
            process_index: From 0 to ``num_processes - 1``; parts are in this order in the batch.
            num_processes: Must divide the batch size.

        Returns:
            float32 images [B / num_processes, C, H, W] in [0, 1], and their labels: int64 [B / num_processes] or, with
            CutMix, float32 [B / num_processes, K].

        Raises:
            InputError: A batch size that the number of processes does not divide.
        """
        self._check_share(num_processes)
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step} of an epoch of {self.steps_per_epoch} steps")
        places = np.arange(self.batch_size).reshape(num_processes, -1)[process_index]
        make = self._mixed if self.augmentation.cutmix else self._augmented
        images, labels = make(epoch, step, places)
        return to_float(images), labels

    def indices(self, epoch: int, step: int) -> dict[str, list[int]]:
        """Return the images of a batch, by their indices in the real set and among the generated images."""
        real, generated = self._drawn(epoch, step, np.arange(self.batch_size))
        return {"real": real.tolist(), "generated": generated.tolist()}

    def loader(
        self,
        epoch: int,
        first_step: int = 0,
        *,
        process_index: int = 0,
        num_processes: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> Iterable[tuple[Tensor, Tensor]]:
        """Return a process's parts of one epoch's batches, starting at ``first_step``; see `batch`.

        Args:
            epoch: From 0.
            first_step: From 0.
            process_index: From 0 to ``num_processes - 1``.
            num_processes: Must divide the batch size.
            workers: Processes that prepare batches; 0 for none.
            pin_memory: Whether batches are in page-locked memory, for copies to a GPU.

        Raises:
            InputError: A batch size that the number of processes does not divide.
        """
        self._check_share(num_processes)  # here, because workers wrap exceptions
        self.indices(epoch, first_step)  # shuffles for the pass, which otherwise every forked worker repeats
        return DataLoader(
            # A "sample" is a step number, which `collate_fn` turns into a batch.
            range(first_step, self.steps_per_epoch),  # pyright: ignore[reportArgumentType]
            batch_size=None,
            collate_fn=partial(  # pyright: ignore[reportArgumentType]
                self.batch, epoch, process_index=process_index, num_processes=num_processes
            ),
            num_workers=workers,
            pin_memory=pin_memory,
            worker_init_fn=_outlive_sigterm,
            generator=torch.Generator(),  # otherwise every epoch draws from the global one
        )

    def _check_share(self, num_processes: int) -> None:
        if self.batch_size % num_processes:
            raise InputError(
                f"--batch-size {self.batch_size} (over all processes) cannot be shared by {num_processes} processes. "
                f"Use a multiple of {num_processes}."
            )

    def _mixed(self, epoch: int, step: int, places: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return mixed images at places of a batch, uint8, and their soft labels; partners are from the whole batch."""
        height, width = self.images.images.shape[2:]
        bits = random_bits(4, self.seed, epoch, step, _BOX)
        box = cutmix_box(bits, height, width, probability=self.augmentation.cutmix)
        partners = permutation(self.batch_size, self.seed, epoch, step, _PARTNERS)[places]
        needed, rows = np.unique([places, partners], return_inverse=True)
        images, labels = self._augmented(epoch, step, needed)
        labels = F.one_hot(labels, len(self.images.classes)).float()
        mine, other = torch.from_numpy(rows.reshape(2, -1)).to(images.device)
        pairs = (each.index_select(0, index) for index in (mine, other) for each in (images, labels))
        return cutmix(*pairs, box=box)

    def _augmented(self, epoch: int, step: int, places: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return augmented images at places of a batch, uint8, and their labels.

        Bits are drawn on the CPU for the whole batch, so that they depend neither on the device nor on the places.
        """
        images, labels = self._read(epoch, step, places)
        bits = random_bits(BITS * self.batch_size, self.seed, epoch, step).reshape(BITS, -1)
        return augment(images, self.augmentation, bits[:, places]), labels

    def _read(self, epoch: int, step: int, places: np.ndarray) -> tuple[Tensor, Tensor]:
        index, generated_index = self._drawn(epoch, step, places)
        device = self.images.labels.device
        # `index_select` copies whole images, `[...]` copies uint8 pixel by pixel.
        real = torch.from_numpy(index).to(device)
        images, labels = (each.index_select(0, real) for each in (self.images.images, self.images.labels))
        if self.generated is None:
            return images, labels
        generated_images, generated_labels = (each.to(device) for each in self.generated.read(generated_index))
        is_generated = self._is_generated[places]
        order = np.where(is_generated, len(real) + np.cumsum(is_generated), np.cumsum(~is_generated)) - 1
        order = torch.from_numpy(order).to(device)
        images, labels = torch.cat([images, generated_images]), torch.cat([labels, generated_labels])
        return images.index_select(0, order), labels.index_select(0, order)

    def _drawn(self, epoch: int, step: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices of the real and of the generated images at places of a batch."""
        batch = epoch * self.steps_per_epoch + step
        is_generated, rank = self._is_generated[places], self._rank[places]
        real = self._real(batch * (self.batch_size - self._n_generated) + rank[~is_generated])
        if self.generated is None:
            return real, np.empty(0, dtype=np.int64)
        return real, self.generated.drawn(batch * self._n_generated + rank[is_generated], self.seed)

    def _real(self, positions: np.ndarray) -> np.ndarray:
        """Return the indices of the real images at positions of the endless sequence of passes."""
        number, place = np.divmod(positions, self.steps_per_epoch * self.batch_size)
        index = np.empty_like(positions)
        for each in np.unique(number):
            index[number == each] = self._pass_order(int(each))[place[number == each]]
        return index

    def _pass_order(self, number: int) -> np.ndarray:
        """Return the order of a pass. The last one is kept, because it can take longer than a batch."""
        if number != self._pass:
            self._pass, self._order = number, permutation(len(self.images), self.seed, number)
        return self._order


def _outlive_sigterm(worker: int) -> None:
    """Ignore SIGTERM, which is often sent to all processes of a group; the training process ends its workers."""
    del worker
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _n_generated(generated: GeneratedImages | None, fraction: float, batch_size: int) -> int:
    """Return the number of generated images in a batch; fractions that are not possible are refused."""
    if not 0 <= fraction < 1:
        raise InputError(f"--generated-fraction {fraction} is not allowed. Use a number of at least 0 and below 1.")
    if (generated is not None) != (fraction > 0):
        missing = "--generated, .npz files" if fraction else "--generated-fraction, such as 0.7"
        given = f"--generated-fraction {fraction}" if fraction else "--generated"
        raise InputError(f"{given} needs {missing}. Give both or none.")
    count = round(batch_size * fraction)
    if generated is None:
        return 0
    if not 0 < count < batch_size:
        kind = "real" if count else "generated"
        raise InputError(
            f"--generated-fraction {fraction} of --batch-size {batch_size} leaves no {kind} image in a batch. "
            "Use a fraction closer to 0.5 or a larger batch."
        )
    if count > len(generated):
        raise InputError(
            f"--generated-fraction {fraction} of --batch-size {batch_size} needs {count} generated images per batch, "
            f"and --generated has {len(generated)}. Give more files or use a smaller fraction."
        )
    return count
