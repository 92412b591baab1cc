"""Datasets read from their files: each once, into uint8 tensors."""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image

from ..errors import InputError, one_line, unknown
from ..files import locked
from ..randomness import permutation
from .datasets import DATASETS, Dataset
from .image_files import ImageFiles, Size, Tree, decode, open_tree, read_folder
from .images import Images, hold_out


def load_images(
    dataset: str,
    data_dir: str | Path | None,
    split: str,
    *,
    img_size: int | None = None,
    in_chans: int | None = None,
) -> Images:
    """Read a split of a dataset and decode it into memory.

    What is published class by class comes in a fixed shuffled order, the rest in the order of its publication.

    Args:
        dataset: A name in `DATASETS`.
        data_dir: Where the files lie or, for MNIST and CIFAR, are downloaded to; digits need none.
        split: "train" or "test".
        img_size: Height and width to crop and resize to; by default the dataset's own.
        in_chans: 1 for grey, 3 for RGB; by default the dataset's own.

    Raises:
        InputError: Names or values that are not allowed; files that are missing, of another layout, cut short, or too
            large for the memory; labels outside the classes.
    """
    if dataset not in DATASETS:
        raise unknown("--dataset", dataset, DATASETS)
    if split not in _SPLITS:
        raise unknown("split", split, _SPLITS)
    entry = DATASETS[dataset]
    size = _size(entry, img_size, in_chans)
    if data_dir is None and dataset != "digits":
        raise InputError(f"--data-dir is needed for --dataset {dataset}; give the folder that holds {entry.title}")
    return _checked(_READERS[dataset](entry, Path(data_dir or ".").expanduser(), split, size), entry)


def _size(dataset: Dataset, img_size: int | None, in_chans: int | None) -> Size:
    """The size that was asked for, the dataset's own where none was."""
    side = dataset.side(img_size)
    in_chans = dataset.in_chans if in_chans is None else in_chans
    if in_chans not in (1, 3):
        raise InputError(f"--in-chans {in_chans} is not possible; give 1 (grey) or 3 (RGB)")
    return Size(in_chans, side)


def _checked(images: Images, dataset: Dataset) -> Images:
    """The same set, once it is known to have images, a label for each, and no label outside the classes."""
    if len(images.images) != len(images.labels) or not len(images):
        raise InputError(
            f"--dataset {dataset.name} has {len(images.images)} images and {len(images.labels)} labels; "
            "there must be as many of one as of the other, and at least one: replace its files"
        )
    num_classes = dataset.num_classes or len(images.classes)
    lowest, highest = int(images.labels.min()), int(images.labels.max())
    if lowest < 0 or highest >= num_classes:
        raise InputError(
            f"--dataset {dataset.name} has labels from {lowest} to {highest}; allowed are 0 to {num_classes - 1}: "
            "replace its files"
        )
    return images


# A reader a dataset: (dataset, data_dir, split, size) -> Images


def _digits(dataset: Dataset, data_dir: Path, split: str, size: Size) -> Images:
    """The 1,797 digits that come with scikit-learn; a fixed fifth of each class is the test set."""
    from sklearn.datasets import load_digits  # takes seconds, which the other datasets need not wait

    pixels, labels = load_digits(return_X_y=True)  # [1797, 64], 0 to 16
    images = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    train, test = hold_out(_from_arrays(images, labels, "0123456789", dataset.title, size), 0.2, seed=0)
    return train if split == "train" else test


_TORCHVISION = {  # name: class in torchvision, the files that it reads
    "mnist": ("MNIST", "MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte"),
    "cifar10": ("CIFAR10", "cifar-10-batches-py (in https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz)"),
    "cifar100": ("CIFAR100", "cifar-100-python (in https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz)"),
}


def _torchvision(dataset: Dataset, data_dir: Path, split: str, size: Size) -> Images:
    """A dataset of torchvision, downloaded first where it is not there."""
    try:
        source = _open_torchvision(dataset, data_dir, split, download=False)
    except InputError:
        with _alone(data_dir / f".{dataset.name}.lock"):
            source = _open_torchvision(dataset, data_dir, split, download=True)
    return _from_arrays(np.asarray(source.data), source.targets, source.classes, dataset.title, size)


def _alone(lock: Path) -> AbstractContextManager[Any]:
    """Keeps the others out that would download into the same files meanwhile, such as cells of a sweep."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        return locked(lock, wait=True)
    except (OSError, ImportError):
        return nullcontext()  # nothing can be written there, as the download says itself, or there are no locks


def _open_torchvision(dataset: Dataset, data_dir: Path, split: str, *, download: bool) -> Any:
    import torchvision.datasets  # not in the light base

    name, files = _TORCHVISION[dataset.name]
    try:
        return getattr(torchvision.datasets, name)(data_dir, train=split == "train", download=download)
    except (OSError, RuntimeError, ValueError, LookupError, AssertionError) as error:
        raise InputError(
            f"--data-dir {data_dir} holds no whole {dataset.title}, and it could not be downloaded "
            f"({one_line(error)}); put {files} there"
        ) from error


def _from_arrays(images: np.ndarray, labels: ArrayLike, classes: Sequence[str], title: str, size: Size) -> Images:
    """Images from uint8 arrays [N, H, W] or [N, H, W, 3]."""
    decoded = decode(lambda index: Image.fromarray(images[index]), np.arange(len(images)), size)
    return Images(decoded, torch.from_numpy(np.asarray(labels, dtype=np.int64)), tuple(classes), title)


_CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _cifar(dataset: Dataset, data_dir: Path, split: str, size: Size) -> Images:
    """CIFAR from torchvision's files or, where there are such, from image files in folders or tars of classes."""
    if not any(_split_path(data_dir, each) for each in _SPLITS):
        return _torchvision(dataset, data_dir, split, size)
    files = _cifar_files(dataset, data_dir, split)
    jpeg = all(PurePath(name).suffix.lower() in (".jpg", ".jpeg") for name in files.names)
    return _from_files(files, f"{dataset.title} ({'JPEG copy' if jpeg else 'image files'})", size, shuffle=True)


def _cifar_files(dataset: Dataset, data_dir: Path, split: str) -> ImageFiles:
    """CIFAR's image files, once they are known to have its classes."""
    files = _read_split(data_dir, split)
    # torchvision's order of the classes is the alphabet's, in CIFAR-100 too.
    expected = _CIFAR10_CLASSES if dataset.name == "cifar10" else files.classes
    if files.classes != expected or len(files.classes) != dataset.num_classes:
        raise InputError(
            f"--data-dir: {files.path} has {len(files.classes)} classes ({', '.join(files.classes[:10])}); "
            f"{dataset.title} has {dataset.num_classes}: make a folder for each, named as torchvision names it"
        )
    return files


def _folder(dataset: Dataset, data_dir: Path, split: str, size: Size) -> Images:
    """Any images in folders or tars of classes; the training set says which classes there are."""
    files, train = _read_split(data_dir, split), _read_split(data_dir, "train")
    if strange := sorted(set(files.classes) - set(train.classes)):
        raise InputError(
            f"--data-dir: {files.path} has classes that {train.path} has not ({', '.join(strange[:5])}); "
            "rename or remove their folders"
        )
    if len(train.classes) < 2:
        raise InputError(
            f"--data-dir: {train.path} has one class ({', '.join(train.classes)}); give a folder for each of 2 or more"
        )
    labels = [train.classes.index(files.classes[label]) for label in files.labels]
    files = replace(files, labels=labels, classes=train.classes)
    return _from_files(files, data_dir.resolve().name, size, shuffle=True, threads=os.cpu_count() or 1)


_SPLITS = {"train": ("train",), "test": ("test", "val")}  # split: names of its folder or tar


def _split_path(data_dir: Path, split: str) -> Path | None:
    """The folder or tar of a split, if there is one."""
    paths = (data_dir / f"{name}{suffix}" for name in _SPLITS[split] for suffix in ("", ".tar"))
    return next((path for path in paths if path.exists()), None)


def _read_split(data_dir: Path, split: str) -> ImageFiles:
    path = _split_path(data_dir, split)
    if path is None:
        raise InputError(
            f"--data-dir {data_dir} has no {' or '.join(_SPLITS[split])}; it must hold train (or train.tar) and test "
            "or val (or test.tar or val.tar), each with a folder of images a class"
        )
    return read_folder(path)


def _from_files(files: ImageFiles, title: str, size: Size, *, shuffle: bool, threads: int = 1) -> Images:
    """Decode image files, in their order or shuffled in a way that depends on their number only."""
    places = permutation(len(files.names), 0) if shuffle else np.arange(len(files.names))
    labels = torch.empty(len(files.names), dtype=torch.int64)
    labels[places] = torch.as_tensor(files.labels, dtype=torch.int64)
    return Images(decode(files.open, places, size, threads=threads), labels, files.classes, title)


def _tiny_imagenet(dataset: Dataset, data_dir: Path, split: str, size: Size) -> Images:
    """TinyImageNet from its zip, without unpacking it, or from its folder; ``val`` is the test set."""
    with open_tree(_tiny_imagenet_path(data_dir)) as tree:
        # The training set is published class by class, the validation set in random order.
        return _from_files(_tiny_imagenet_files(tree, split), dataset.title, size, shuffle=split == "train")


def _tiny_imagenet_path(data_dir: Path) -> Path:
    """The zip or folder of TinyImageNet that ``data_dir`` is or holds."""
    if data_dir.is_file() or (data_dir / "wnids.txt").is_file():
        return data_dir
    folder, zips = data_dir / "tiny-imagenet-200", sorted(data_dir.glob("tiny-imagenet-200*.zip"))
    if folder.is_dir():
        return folder
    if len(zips) == 1:
        return zips[0]
    found = f"several zips ({', '.join(path.name for path in zips)})" if zips else "no TinyImageNet"
    raise InputError(f"--data-dir {data_dir} holds {found}; give one tiny-imagenet-200.zip, or the folder in it")


def _tiny_imagenet_files(tree: Tree, split: str) -> ImageFiles:
    """The images of train/<class>/images, or those that val/val_annotations.txt names."""
    try:
        classes = tuple(sorted(tree.read("wnids.txt").decode().split()))
        if split == "train":
            names = [name for name in tree.names if name.startswith("train/") and name.endswith(".JPEG")]
            class_names = [name.split("/")[1] for name in names]
        else:
            lines = [line.split("\t") for line in tree.read("val/val_annotations.txt").decode().splitlines()]
            names = [f"val/images/{line[0]}" for line in lines]
            class_names = [line[1] for line in lines]
        label_of = {name: label for label, name in enumerate(classes)}
        labels = [label_of[name] for name in class_names]
    # A missing member of a zip is a KeyError, as is a class that wnids.txt does not name.
    except (OSError, LookupError, ValueError) as error:
        raise InputError(
            f"--data-dir: {tree.path} is not laid out as TinyImageNet ({one_line(error)}); "
            "give the official tiny-imagenet-200.zip, or the folder in it"
        ) from error
    return ImageFiles(tree.path, names, labels, classes, lambda index: tree.read(names[index]))


_READERS: dict[str, Callable[[Dataset, Path, str, Size], Images]] = {
    "digits": _digits,
    "mnist": _torchvision,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "tiny_imagenet": _tiny_imagenet,
    "folder": _folder,
}


def holds(dataset: str, folder: Path) -> bool:
    """Whether `load_images` would find a dataset in a folder; nothing is downloaded or decoded.

    No more than the test split is opened: a large training set takes long to list.

    Args:
        dataset: A name in `DATASETS`; digits need no files and are in any folder.
        folder: What would be its ``data_dir``.
    """
    entry = DATASETS[dataset]
    has_split = [_split_path(folder, split) is not None for split in _SPLITS]
    try:
        if dataset == "tiny_imagenet":
            _tiny_imagenet_path(folder)
        elif dataset == "folder":
            return all(has_split) and len(_read_split(folder, "test").classes) > 1
        elif dataset in ("cifar10", "cifar100") and any(has_split):
            return all(has_split) and bool(_cifar_files(entry, folder, "test"))
        elif dataset != "digits":
            _open_torchvision(entry, folder, "test", download=False)
    except InputError:
        return False
    return True
