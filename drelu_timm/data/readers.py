"""Readers of the datasets: from their files to uint8 tensors."""

import os
import posixpath
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image
from tqdm import tqdm

from ..errors import InputError, one_line, unknown
from ..files import locked
from ..launch import is_first_process
from ..randomness import permutation
from .datasets import DATASETS, Dataset
from .image_files import (
    ImageFiles,
    Size,
    Tree,
    below,
    decode,
    formats,
    images_by_class,
    natural,
    open_tree,
    why_ignored,
)
from .images import Images, hold_out

_SPLITS = {"train": ("train",), "test": ("test", "val")}  # split: names of its folder or tar
_CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_TORCHVISION = {  # name: class in torchvision, the files that it reads
    "mnist": ("MNIST", "MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte"),
    "cifar10": ("CIFAR10", "cifar-10-batches-py (in https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz)"),
    "cifar100": ("CIFAR100", "cifar-100-python (in https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz)"),
}
_ANNOTATIONS = "val/val_annotations.txt"


def load_images(
    dataset: str,
    data_dir: str | Path | None,
    split: str,
    *,
    img_size: int | None = None,
    in_chans: int | None = None,
) -> Images:
    """Read a split of a dataset and decode it into memory.

    For image files a line on stderr first states the numbers of images, classes and ignored files. Datasets that are
    published class by class are shuffled in a fixed way; the others keep their published order.

    Args:
        dataset: A name in `DATASETS`.
        data_dir: Folder of the files, to which MNIST and CIFAR are downloaded; digits need none. For image files it
            contains train, and test or val, each a folder or a .tar file. The classes are the folders at its top, or
            in a single folder at its top with the name of the split, as in the tar made by ``tar cf train.tar train``.
        split: "train" or "test".
        img_size: Height and width to crop and resize to; by default the dataset's own.
        in_chans: 1 for gray, 3 for RGB; by default the dataset's own.

    Raises:
        InputError: Names or values that are not allowed; files that are missing, have another layout, are cut short,
            have an unknown pixel range, or do not fit into memory; labels outside the classes; classes that differ
            from the other split's.
    """
    if dataset not in DATASETS:
        raise unknown("--dataset", dataset, DATASETS)
    if split not in _SPLITS:
        raise unknown("split", split, _SPLITS)
    entry = DATASETS[dataset]
    size = Size(entry.in_chans if in_chans is None else in_chans, entry.side(img_size))
    if size.in_chans not in (1, 3):
        raise InputError(f"--in-chans {in_chans} is not allowed. Use 1 (gray) or 3 (RGB).")
    if data_dir is None and dataset != "digits":
        raise InputError(f"--data-dir is needed for --dataset {dataset}. Give the folder that contains {entry.title}.")
    images = _READERS[dataset](entry, Path(data_dir or ".").expanduser(), split, size)
    _check_labels(images, entry)
    return images


def _check_labels(images: Images, dataset: Dataset) -> None:
    """Refuse a set without images, without a label for each, or with a label outside the classes."""
    if len(images.images) != len(images.labels) or not len(images):
        raise InputError(
            f"--dataset {dataset.name} has {len(images.images)} images and {len(images.labels)} labels. The numbers "
            "must be equal and at least 1: replace its files."
        )
    num_classes = dataset.num_classes or len(images.classes)
    lowest, highest = int(images.labels.min()), int(images.labels.max())
    if lowest < 0 or highest >= num_classes:
        raise InputError(
            f"--dataset {dataset.name} has labels from {lowest} to {highest}. They must be from 0 to "
            f"{num_classes - 1}: replace its files."
        )


# Readers: (dataset, data_dir, split, size) -> Images


def _digits(dataset: Dataset, data_dir: Path, split: str, size: Size) -> Images:
    """Read the 1,797 digits that scikit-learn contains; a fixed fifth of each class is the test set."""
    from sklearn.datasets import load_digits  # takes seconds to import

    pixels, labels = load_digits(return_X_y=True)  # [1797, 64], 0 to 16
    images = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    train, test = hold_out(_from_arrays(images, labels, "0123456789", dataset.title, size), 0.2, seed=0)
    return train if split == "train" else test


def _torchvision(dataset: Dataset, data_dir: Path, split: str, size: Size) -> Images:
    """Read a dataset of torchvision, and download it first if it is missing."""
    try:
        source = _open_torchvision(dataset, data_dir, split, download=False)
    except InputError:
        with _download_lock(data_dir / f".{dataset.name}.lock"):
            source = _open_torchvision(dataset, data_dir, split, download=True)
    return _from_arrays(np.asarray(source.data), source.targets, source.classes, dataset.title, size)


def _download_lock(lock: Path) -> AbstractContextManager[Any]:
    """Wait for other processes, such as cells of a sweep, that download into the same files."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        return locked(lock, wait=True)
    except (OSError, ImportError):
        return nullcontext()  # a folder that is not writable, which the download reports, or a disk without locks


def _open_torchvision(dataset: Dataset, data_dir: Path, split: str, *, download: bool) -> Any:
    import torchvision.datasets  # not in the light base

    name, files = _TORCHVISION[dataset.name]
    try:
        return getattr(torchvision.datasets, name)(data_dir, train=split == "train", download=download)
    except (OSError, RuntimeError, ValueError, LookupError, AssertionError) as error:
        raise InputError(
            f"--data-dir {data_dir} does not contain all of {dataset.title}, and it could not be downloaded "
            f"({one_line(error)}). Put {files} there."
        ) from error


def _from_arrays(images: np.ndarray, labels: ArrayLike, classes: Sequence[str], title: str, size: Size) -> Images:
    """Convert uint8 arrays [N, H, W] or [N, H, W, 3] to images."""
    decoded = decode(lambda index: Image.fromarray(images[index]), np.arange(len(images)), size)
    return Images(decoded, torch.from_numpy(np.asarray(labels, dtype=np.int64)), tuple(classes), title)


def _cifar(dataset: Dataset, data_dir: Path, split: str, size: Size) -> Images:
    """Read CIFAR from folders or tars of image files if there are any, else from torchvision's files."""
    if not any(_split_path(data_dir, each) for each in _SPLITS):
        return _torchvision(dataset, data_dir, split, size)
    with _open_split(data_dir, split) as files:
        _check_classes(dataset, files)
        if dataset.name == "cifar100":  # the names of its classes are not known here
            _check_other_split(files, data_dir, split)
        jpeg = all(formats()[PurePath(name).suffix.lower()] == "JPEG" for name in files.names)
        return _from_files(files, f"{dataset.title} ({'JPEG copy' if jpeg else 'image files'})", split, size)


def _folder(dataset: Dataset, data_dir: Path, split: str, size: Size) -> Images:
    """Read image files in folders or tars of classes."""
    with _open_split(data_dir, split) as files:
        _check_classes(dataset, files)
        _check_other_split(files, data_dir, split)
        return _from_files(files, data_dir.resolve().name, split, size, threads=os.cpu_count() or 1)


def _check_classes(dataset: Dataset, files: ImageFiles) -> None:
    """Refuse classes that are not the dataset's."""
    if dataset.num_classes is None and len(files.classes) < 2:
        raise InputError(
            f"--data-dir: {files.tree.path} has one class ({', '.join(files.classes)}). "
            "Give one folder for each of at least 2 classes."
        )
    # torchvision's order of the classes is alphabetical, in CIFAR-100 too.
    expected = _CIFAR10_CLASSES if dataset.name == "cifar10" else files.classes
    if files.classes != expected or len(files.classes) != (dataset.num_classes or len(files.classes)):
        raise InputError(
            f"--data-dir: {files.tree.path} has {len(files.classes)} classes ({', '.join(files.classes[:10])}), "
            f"{dataset.title} has {dataset.num_classes}. Make one folder for each, with torchvision's names."
        )


def _split_path(data_dir: Path, split: str) -> Path | None:
    """Return the folder or tar of a split, or None.

    Raises:
        InputError: The folder cannot be read.
    """
    try:
        for name in _SPLITS[split]:
            if (folder := data_dir / name).is_dir():
                return folder
            if (tar := data_dir / f"{name}.tar").is_file():
                return tar
    except OSError as error:
        raise InputError(f"--data-dir {data_dir} cannot be read ({one_line(error)}). Make it readable.") from error
    return None


@contextmanager
def _open_split(data_dir: Path, split: str) -> Iterator[ImageFiles]:
    """Open the image files of a split, in timm's natural order of their paths."""
    path = _split_path(data_dir, split)
    if path is None:
        raise InputError(f"--data-dir {data_dir} has no {' or '.join(_SPLITS[split])}{_compressed(data_dir, split)}.")
    with open_tree(path) as tree:
        tree = below(tree, _wrapping_folder(tree, split))
        try:
            files = images_by_class(tree._replace(names=sorted(tree.names, key=natural)))
        except InputError as error:  # such as a test set whose labels were not published
            val = next((data_dir / name for name in ("val", "val.tar") if (data_dir / name).exists()), None)
            if split == "train" or val is None or path.stem == "val":
                raise
            raise InputError(f"{error} To use {val} as the test set, rename {path.name}.") from error
        yield files


def _compressed(data_dir: Path, split: str) -> str:
    """Return the rest of the error for a split that is missing."""
    names = {f"{name}.{suffix}" for name in _SPLITS[split] for suffix in ("tar.gz", "tgz", "tar.bz2", "tar.xz", "zip")}
    if found := sorted(path.name for path in data_dir.glob("*") if path.name in names):
        return f", but {found[0]}. Unpack it: only .tar files that are not compressed are read in place"
    layout = "It must contain train (or train.tar) and test or val (or test.tar or val.tar)"
    return f". {layout}, each with one folder of images per class"


def _wrapping_folder(tree: Tree, split: str) -> str:
    """Return the folder named as the split that contains all files, as in a tar by `tar cf train.tar train`; or ""."""
    folders = {name.rpartition("/")[0] for name in tree.names if name[-1] != "/" and why_ignored(name) != "hidden"}
    shared = posixpath.commonpath(folders).split("/") if folders else []
    depth = next((depth for depth, name in enumerate(shared, 1) if name in _SPLITS[split]), 0)
    return "".join(f"{name}/" for name in shared[:depth])


def _check_other_split(files: ImageFiles, data_dir: Path, split: str) -> None:
    """Refuse another split with other classes; a training does not need a test set."""
    other = "test" if split == "train" else "train"
    if other == "train" or _split_path(data_dir, other):
        with _open_split(data_dir, other) as others:
            _check_same_classes(files, others.classes, str(others.tree.path))


def _check_same_classes(files: ImageFiles, expected: Sequence[str], where: str) -> None:
    """Refuse missing and additional classes; ``where`` names what ``expected`` is from."""
    only = {
        str(files.tree.path): sorted(set(files.classes) - set(expected)),
        where: sorted(set(expected) - set(files.classes)),
    }
    if any(only.values()):
        differing = [f"only {path} has {', '.join(names[:5])}" for path, names in only.items() if names]
        raise InputError(
            f"--data-dir: the classes of {' and '.join(only)} differ ({'; '.join(differing)}). Rename, add or remove "
            "folders until they are the same."
        )


def _from_files(
    files: ImageFiles, title: str, split: str, size: Size, *, shuffle: bool = True, threads: int = 1
) -> Images:
    """Print what was found and decode it, in order, or shuffled in a way that only the number of images determines."""
    if is_first_process():
        tqdm.write(f"{split}: {files}", file=sys.stderr)
    places = permutation(len(files.names), 0) if shuffle else np.arange(len(files.names))
    labels = torch.empty(len(files.names), dtype=torch.int64)
    labels[places] = torch.as_tensor(files.labels, dtype=torch.int64)
    return Images(decode(files.open, places, size, threads=threads), labels, files.classes, title)


def _tiny_imagenet(dataset: Dataset, data_dir: Path, split: str, size: Size) -> Images:
    """Read TinyImageNet from its zip, without unpacking it, or from its folder; ``val`` is the test set."""
    with open_tree(_tiny_imagenet_path(data_dir)) as tree:
        # The training set is published class by class, the validation set in random order.
        return _from_files(_tiny_imagenet_files(tree, split), dataset.title, split, size, shuffle=split == "train")


def _tiny_imagenet_path(data_dir: Path) -> Path:
    """Return the zip or folder of TinyImageNet, which is ``data_dir`` or is in it."""
    if data_dir.is_file() or (data_dir / "wnids.txt").is_file():
        return data_dir
    folder, zips = data_dir / "tiny-imagenet-200", sorted(data_dir.glob("tiny-imagenet-200*.zip"))
    if folder.is_dir():
        return folder
    if len(zips) == 1:
        return zips[0]
    found = f"several zips ({', '.join(path.name for path in zips)})" if zips else "no TinyImageNet"
    raise InputError(f"--data-dir {data_dir} has {found}. Give one tiny-imagenet-200.zip, or the folder in it.")


def _tiny_imagenet_files(tree: Tree, split: str) -> ImageFiles:
    """Return the images of train/<class>/images, or the images that val/val_annotations.txt lists.

    Raises:
        InputError: Another layout, listed images that are missing, or classes other than in wnids.txt.
    """
    roots = [name.removesuffix("wnids.txt") for name in tree.names if PurePath(name).name == "wnids.txt"]
    tree = below(tree, min(roots, key=len, default=""))  # the official zip has one folder with everything
    classes = _tiny_imagenet_table(tree, "wnids.txt")
    # The images keep the order of the zip or, in a folder, of the sorted paths.
    files = images_by_class(below(tree, "train/")) if split == "train" else _tiny_imagenet_val(tree)
    _check_same_classes(files, [line[0] for line in classes], "wnids.txt")
    return files


def _tiny_imagenet_val(tree: Tree) -> ImageFiles:
    """Return the images that val/val_annotations.txt lists, in its order."""
    table = _tiny_imagenet_table(tree, _ANNOTATIONS, columns=2)
    class_of = {f"val/images/{name}": class_name for name, class_name, *_ in table}
    present = {name for name in tree.names if name.startswith("val/") and name[-1] != "/"} - {_ANNOTATIONS}
    if missing := [name for name in class_of if name not in present]:
        raise InputError(
            f"--data-dir: {tree.path} lacks {len(missing)} of the images that {_ANNOTATIONS} lists "
            f"({', '.join(missing[:3])}). Give the official tiny-imagenet-200.zip, or the folder in it."
        )
    ignored = Counter(why_ignored(name) or "not in val_annotations.txt" for name in present - class_of.keys())
    classes = tuple(sorted(set(class_of.values()), key=natural))
    labels = [classes.index(class_name) for class_name in class_of.values()]
    return ImageFiles(tree, list(class_of), labels, classes, ignored)


def _tiny_imagenet_table(tree: Tree, name: str, *, columns: int = 1) -> list[list[str]]:
    """Return the words of every line of a text file, which must be ``columns`` or more."""
    try:
        table = [line.split() for line in tree.read(name).decode().splitlines() if line.strip()]
        if any(len(line) < columns for line in table):
            raise ValueError(f"a line of {name} has fewer than {columns} columns")
    # KeyError: a missing member of a zip.
    except (OSError, KeyError, ValueError) as error:
        raise InputError(
            f"--data-dir: {tree.path} does not have the layout of TinyImageNet ({one_line(error)}). "
            "Give the official tiny-imagenet-200.zip, or the folder in it."
        ) from error
    return table


_READERS: dict[str, Callable[[Dataset, Path, str, Size], Images]] = {
    "digits": _digits,
    "mnist": _torchvision,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "tiny_imagenet": _tiny_imagenet,
    "folder": _folder,
}


def holds(dataset: str, folder: Path) -> bool:
    """Return whether `load_images` would find a dataset in a folder, without downloading or decoding anything.

    Only the test split is opened, because listing a large training set takes long.

    Args:
        dataset: A name in `DATASETS`. For digits, which need no files, the answer is always True.
        folder: Folder that would be ``data_dir``.
    """
    entry = DATASETS[dataset]
    try:
        has_split = [_split_path(folder, split) is not None for split in _SPLITS]
        if dataset == "tiny_imagenet":
            _tiny_imagenet_path(folder)
        elif dataset == "folder" or (dataset in ("cifar10", "cifar100") and any(has_split)):
            if not all(has_split):
                return False
            with _open_split(folder, "test") as files:
                _check_classes(entry, files)
        elif dataset != "digits":
            _open_torchvision(entry, folder, "test", download=False)
    except InputError:
        return False
    return True
