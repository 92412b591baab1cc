import io
import itertools
import os
import tarfile
import time
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from drelu_timm.data.datasets import DATASETS
from drelu_timm.data.images import Images, hold_out, to_float
from drelu_timm.data.readers import holds, load_images
from drelu_timm.errors import InputError
from drelu_timm.randomness import permutation

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def real_data(name: str) -> Path:
    """A folder of real data, or skip."""
    beside_repository = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    folder = Path(os.environ.get("DRELU_TIMM_DATA", beside_repository))
    if not (folder / name).exists():
        pytest.skip(f"no {name} in {folder}; DRELU_TIMM_DATA names the folder of real data")
    return folder


@pytest.fixture
def offline(monkeypatch):
    """Every download fails at once."""
    monkeypatch.setattr(urllib.request, "_opener", None)
    for scheme in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(scheme, "http://127.0.0.1:9")
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)


def image_bytes(grey: int, *, size: tuple[int, int] = (8, 8), format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (grey, grey, grey)).save(buffer, format)
    return buffer.getvalue()


def write_folder(folder: Path, classes, n: int, **options) -> Path:
    """Images of one gray value per class: 10 times its rank."""
    suffix = options.get("format", "png").lower()
    for rank, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(n):
            (folder / name / f"{index}.{suffix}").write_bytes(image_bytes(10 * rank, **options))
    return folder


def pack(folder: Path) -> Path:
    """Move a folder into a tar next to it."""
    with tarfile.open(folder.with_suffix(".tar"), "w") as tar:
        tar.add(folder, ".")
    for file in folder.rglob("*.*"):
        file.unlink()
    for subfolder in folder.iterdir():
        subfolder.rmdir()
    folder.rmdir()
    return folder.with_suffix(".tar")


def write_mnist(folder: Path, labels, n_images: int) -> Path:
    """A test split in MNIST's own format; the training files are there but empty."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1"):
        (raw / f"{name}-ubyte").touch()
    header = b"".join(value.to_bytes(4, "big") for value in (0x803, n_images, 28, 28))
    (raw / "t10k-images-idx3-ubyte").write_bytes(header + bytes(range(n_images)) * 28 * 28)
    header = b"".join(value.to_bytes(4, "big") for value in (0x801, len(labels)))
    (raw / "t10k-labels-idx1-ubyte").write_bytes(header + bytes(labels))
    return folder


def tiny_imagenet_files() -> dict[str, bytes]:
    """Two of the classes, three training and two validation images each."""
    files = {"wnids.txt": b"n02\nn01\n", "train/n01/n01_boxes.txt": b""}
    for rank, name in enumerate(("n01", "n02")):
        for index in range(3):
            files[f"train/{name}/images/{name}_{index}.JPEG"] = image_bytes(200 * rank, size=(64, 64), format="JPEG")
    lines = []
    for index, rank in enumerate((1, 0, 0, 1)):
        files[f"val/images/val_{index}.JPEG"] = image_bytes(200 * rank, size=(64, 64), format="JPEG")
        lines.append(f"val_{index}.JPEG\tn0{rank + 1}\t0\t0\t62\t57")
    files["val/val_annotations.txt"] = "\n".join(lines).encode() + b"\n"
    return files


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"tiny-imagenet-200/{name}", content)
    return path


def numbered(n: int, *, channels: int = 3, side: int = 6, num_classes: int = 5) -> Images:
    """Random images whose labels go round the classes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, channels, side, side), dtype=torch.uint8, generator=generator)
    return Images(images, torch.arange(n) % num_classes, tuple("abcdefghij"[:num_classes]), "Random")


# Reading


def test_digits():
    train, test = (load_images("digits", None, split) for split in ("train", "test"))
    assert (train.images.shape, test.images.shape) == ((1438, 1, 8, 8), (359, 1, 8, 8))
    assert (train.images.dtype, train.labels.dtype, train.title) == (torch.uint8, torch.int64, "Digits")
    assert (train.images.min(), train.images.max()) == (0, 255)
    assert train.classes == tuple("0123456789")
    assert all(count in range(34, 38) for count in test.labels.bincount())
    # The same digit may be written twice, but not two hundred times.
    in_training = {image.numpy().tobytes() for image in train.images}
    assert sum(image.numpy().tobytes() in in_training for image in test.images) == 0
    assert torch.equal(load_images("digits", None, "test").images, test.images)


def test_size_and_channels():
    digits = load_images("digits", None, "test", img_size=16, in_chans=3)
    assert digits.images.shape == (359, 3, 16, 16)
    assert (digits.images == digits.images[:, :1]).all()
    shrunk = torch.nn.functional.avg_pool2d(digits.images[:, :1].float(), 2)
    assert (shrunk - load_images("digits", None, "test").images).abs().mean() < 16


def test_mean_std_is_that_of_the_pixels():
    images = numbered(20)
    mean, std = images.mean_std()
    pixels = to_float(images.images).double()
    assert mean == pytest.approx(pixels.mean((0, 2, 3)).tolist())
    assert std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist())


def test_real_mnist():
    from torchvision.datasets import MNIST

    test, expected = load_images("mnist", real_data("MNIST"), "test"), MNIST(real_data("MNIST"), train=False)
    assert torch.equal(test.images[:, 0], expected.data)
    assert torch.equal(test.labels, expected.targets)


def test_real_cifar10_jpeg():
    folder = real_data("cifar10-jpeg") / "cifar10-jpeg"
    test = load_images("cifar10", folder, "test")
    assert (test.title, test.classes) == ("CIFAR-10 (JPEG copy)", CIFAR10)
    assert test.images.shape == (10_000, 3, 32, 32)
    assert (test.labels.bincount() == 1000).all()
    assert test[:500].labels.bincount(minlength=10).min() >= 30
    mean, std = test.mean_std()
    assert mean == pytest.approx(DATASETS["cifar10"].mean, abs=0.005)
    assert std == pytest.approx(DATASETS["cifar10"].std, abs=0.005)
    with tarfile.open(folder / "test.tar") as tar:
        image = np.asarray(Image.open(tar.extractfile("./truck/0007.jpg"))).transpose(2, 0, 1)
        matches = (test.images == torch.tensor(image)).flatten(1).all(1)
        assert test.labels[matches].tolist() == [9]
        # The order that published results were measured in.
        names = sorted(member.name for member in tar if member.isfile())
        for place in (0, 1, 2, 4_999, 9_999):
            expected = np.asarray(Image.open(tar.extractfile(names[np.argsort(permutation(10_000, 0))[place]])))
            np.testing.assert_array_equal(test.images[place].permute(1, 2, 0), expected)


def test_real_tiny_imagenet():
    folder = real_data("tiny-imagenet") / "tiny-imagenet"
    test = load_images("tiny_imagenet", folder, "test")
    assert test.images.shape == (10_000, 3, 64, 64)
    assert (test.labels.bincount() == 50).all()
    assert test.classes[test.labels[0]] == "n03444034"  # the first line of val_annotations.txt
    assert test.mean_std()[0] == pytest.approx(DATASETS["tiny_imagenet"].mean, abs=0.005)
    (path,) = folder.glob("*.zip")
    with zipfile.ZipFile(path) as archive:
        lines = archive.read("tiny-imagenet-200/val/val_annotations.txt").decode().splitlines()
        for place in (0, 1, 2, 4_999, 9_999):  # the order that published results were measured in
            name, label, *_ = lines[place].split("\t")
            with archive.open(f"tiny-imagenet-200/val/images/{name}") as file:
                expected = np.asarray(Image.open(file).convert("RGB"))
            np.testing.assert_array_equal(test.images[place].permute(1, 2, 0), expected)
            assert test.classes[test.labels[place]] == label


@pytest.mark.parametrize("packed", [False, True])
def test_folder(tmp_path, packed):
    names = ("apple", "pear", "plum")
    paths = write_folder(tmp_path / "train", names, 30), write_folder(tmp_path / "val", names, 5)
    if packed:
        for path in paths:
            pack(path)
    train, test = (load_images("folder", tmp_path, split, img_size=4) for split in ("train", "test"))
    assert (train.images.shape, test.images.shape) == ((90, 3, 4, 4), (15, 3, 4, 4))
    assert (train.classes, train.title) == (names, tmp_path.name)
    for images in (train, test):
        assert torch.equal(images.images[:, 0, 0, 0].long(), 10 * images.labels)
    # Not class by class, and the same from a folder, from a tar, on every machine and with every NumPy.
    assert train[:30].labels.bincount(minlength=3).min() >= 5
    assert train.labels[:12].tolist() == [0, 0, 1, 0, 2, 0, 2, 0, 0, 0, 2, 1]


def test_oblong_images_are_cropped_to_the_middle(tmp_path):
    oblong = Image.new("RGB", (20, 10), (255, 0, 0))
    oblong.paste((0, 0, 255), (5, 0, 15, 10))
    for split, name in itertools.product(("train", "test"), "ab"):
        (tmp_path / split / name).mkdir(parents=True)
        oblong.save(tmp_path / split / name / "0.png")
    images = load_images("folder", tmp_path, "test", img_size=5).images
    assert (images[0, 2] > 200).all()  # blue to the very edges, but for the resampling
    assert (images[0, 0] < 55).all()


@pytest.mark.parametrize(
    ("format", "title"), [("jpeg", "CIFAR-10 (JPEG copy)"), ("png", "CIFAR-10 (image files)")], ids=["jpeg", "png"]
)
def test_cifar10_image_files(tmp_path, format, title):
    write_folder(tmp_path / "train", CIFAR10, 1, size=(32, 32), format=format)
    pack(write_folder(tmp_path / "test", CIFAR10, 2, size=(32, 32), format=format))
    test = load_images("cifar10", tmp_path, "test")
    assert (len(test), test.title) == (20, title)
    assert torch.equal(test.images[:, 0, 0, 0].long(), 10 * test.labels)


def test_tiny_imagenet_from_zip_and_folder(tmp_path):
    files = tiny_imagenet_files()
    write_zip(tmp_path / "tiny-imagenet-200.zip", files)
    for name, content in files.items():
        path = tmp_path / "unpacked" / "tiny-imagenet-200" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    places = (tmp_path, tmp_path / "tiny-imagenet-200.zip", tmp_path / "unpacked", path.parents[1])
    for data_dir in places:
        train, test = (load_images("tiny_imagenet", data_dir, split) for split in ("train", "test"))
        assert sorted(train.labels.tolist()) == [0, 0, 0, 1, 1, 1]
        assert test.labels.tolist() == [1, 0, 0, 1]
        assert train.classes == ("n01", "n02")
        for images in (train, test):
            assert torch.equal(images.images[:, 0, 0, 0].long(), 200 * images.labels)


# Input that cannot be used


@pytest.mark.parametrize(
    ("dataset", "data_dir", "options", "message"),
    [
        ("cifar11", ".", {}, "--dataset 'cifar11' is unknown; did you mean cifar10"),
        ("mnist", None, {}, "--data-dir is needed for --dataset mnist. Give the folder that contains MNIST"),
        ("folder", ".", {}, "--img-size is needed for --dataset folder. Give the side in pixels"),
        ("digits", None, {"img_size": 0}, "--img-size 0 is not a size. Give the side in pixels, at least 1"),
        ("digits", None, {"in_chans": 2}, r"--in-chans 2 is not allowed. Use 1 \(gray\) or 3 \(RGB\)"),
        ("digits", None, {"img_size": 10**7}, r"--img-size 10000000: .* 179700000.0 GB .* Use a smaller --img-size"),
        ("folder", "absent", {"img_size": 4}, "--data-dir absent has no test or val. It must contain train"),
        ("tiny_imagenet", "absent", {}, "--data-dir absent has no TinyImageNet. Give one tiny-imagenet-200.zip"),
    ],
)
def test_what_cannot_be_asked(dataset, data_dir, options, message):
    with pytest.raises(InputError, match=message):
        load_images(dataset, data_dir, "test", **options)


def test_split_is_checked():
    with pytest.raises(InputError, match="split 'tset' is unknown; did you mean test"):
        load_images("digits", None, "tset")


@pytest.mark.parametrize(
    ("dataset", "files"),
    [("mnist", "MNIST/raw/{train,t10k}"), ("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")],
)
def test_no_files_and_no_network(tmp_path, offline, dataset, files):
    with pytest.raises(InputError) as error:
        load_images(dataset, tmp_path, "test")
    assert f"--data-dir {tmp_path} does not contain all of {DATASETS[dataset].title}, and it could not be" in str(
        error.value
    )
    assert f"Put {files}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture
def downloads(monkeypatch) -> list[str]:
    """Give torchvision a slow download of MNIST that notes its start and end."""
    import torchvision.datasets

    did: list[str] = []

    class MNIST(torchvision.datasets.MNIST):  # which is a part of its paths
        def download(self) -> None:
            if self._check_exists():
                return
            did.append("begins")
            time.sleep(0.2)
            write_mnist(Path(self.root), [3, 1, 4], 3)
            did.append("ends")

    monkeypatch.setattr(torchvision.datasets, "MNIST", MNIST)
    return did


def test_of_several_that_miss_a_dataset_one_downloads_it(tmp_path, downloads):
    with ThreadPoolExecutor(3) as pool:
        sets = [*pool.map(lambda folder: load_images("mnist", folder, "test"), [tmp_path / "data"] * 3)]
    assert [len(images) for images in sets] == [3, 3, 3]
    assert downloads == ["begins", "ends"]


def test_a_download_that_fails_lets_the_next_one_try(tmp_path, downloads, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            load_images("mnist", tmp_path, "test")
    assert len(load_images("mnist", tmp_path, "test")) == 3


def test_no_lock_is_made_where_nothing_is_missing(tmp_path):
    write_mnist(tmp_path, [3, 1, 4], 3)
    load_images("mnist", tmp_path, "test")
    assert [path.name for path in tmp_path.iterdir()] == ["MNIST"]


def test_a_folder_that_cannot_be_written_to_says_so(tmp_path, offline):
    (tmp_path / "file").touch()
    with pytest.raises(
        InputError, match=r"does not contain all of MNIST, and it could not be downloaded \(.*Not a directory"
    ):
        load_images("mnist", tmp_path / "file" / "data", "test")


def test_mnist_files(tmp_path):
    images = load_images("mnist", write_mnist(tmp_path, [3, 1, 4], 3), "test")
    assert images.images.shape == (3, 1, 28, 28)
    assert images.labels.tolist() == [3, 1, 4]


@pytest.mark.parametrize(
    ("labels", "n_images", "cut", "message"),
    [
        ([3, 10, 4], 3, 0, "--dataset mnist has labels from 3 to 10. They must be from 0 to 9"),
        ([3, 1], 3, 0, "--dataset mnist has 3 images and 2 labels"),
        ([3, 1, 4], 3, 100, "does not contain all of MNIST.*Put MNIST/raw/"),
    ],
    ids=["label 10", "label missing", "cut short"],
)
def test_mnist_files_that_are_wrong(tmp_path, labels, n_images, cut, message):
    write_mnist(tmp_path, labels, n_images)
    path = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[: path.stat().st_size - cut])
    with pytest.raises(InputError, match=message):
        load_images("mnist", tmp_path, "test")


def test_cifar10_classes_are_checked(tmp_path):
    write_folder(tmp_path / "train", ("cat", "dog"), 1)
    with pytest.raises(
        InputError, match=r"train has 2 classes \(cat, dog\), CIFAR-10 has 10. Make one folder for each"
    ):
        load_images("cifar10", tmp_path, "train")


def test_cifar10_is_not_mixed_from_two_sources(tmp_path):
    write_folder(tmp_path / "train", CIFAR10, 1)
    with pytest.raises(InputError, match=r"has no test or val\. It must contain train"):
        load_images("cifar10", tmp_path, "test")


def test_folder_without_images(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    with pytest.raises(InputError, match=r"train has no readable images in folders \(ignored files: none\). Put one"):
        load_images("folder", tmp_path, "train", img_size=4)


def test_folder_with_one_class(tmp_path):
    write_folder(tmp_path / "train", ("a",), 2)
    with pytest.raises(InputError, match=r"train has one class \(a\). Give one folder for each of at least 2"):
        load_images("folder", tmp_path, "train", img_size=4)


def test_image_cut_short(tmp_path):
    write_folder(tmp_path / "train", ("a", "b"), 2, size=(64, 64), format="jpeg")
    path = tmp_path / "train" / "b" / "1.jpeg"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"b/1.jpeg in .*train is not a complete image \((?i:.*truncated.*)\)\. Rep"):
        load_images("folder", tmp_path, "train", img_size=4)


def test_tar_cut_short(tmp_path):
    path = pack(write_folder(tmp_path / "train", ("a", "b"), 20))
    path.write_bytes(path.read_bytes()[:9_000])
    with pytest.raises(InputError, match=r"train.tar cannot be read as a tar \(unexpected end of data\). Make it"):
        load_images("folder", tmp_path, "train", img_size=4)


def test_zip_cut_short(tmp_path):
    path = write_zip(tmp_path / "tiny-imagenet-200.zip", tiny_imagenet_files())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"tiny-imagenet-200.zip cannot be read as a zip \(.*\). Make it"):
        load_images("tiny_imagenet", tmp_path, "test")


@pytest.mark.parametrize("missing", ["wnids.txt", "val/val_annotations.txt"])
def test_zip_of_another_layout(tmp_path, missing):
    files = tiny_imagenet_files()
    del files[missing]
    write_zip(tmp_path / "tiny-imagenet-200.zip", files)
    with pytest.raises(InputError, match=f"does not have the layout of TinyImageNet .*{missing}.*Give the official"):
        load_images("tiny_imagenet", tmp_path, "test")


def test_zip_with_an_image_missing(tmp_path):
    files = tiny_imagenet_files()
    del files["val/images/val_2.JPEG"]
    write_zip(tmp_path / "tiny-imagenet-200.zip", files)
    with pytest.raises(InputError, match=r"lacks 1 of the images that val/val_annotations.txt lists \(.*val_2.JPEG\)"):
        load_images("tiny_imagenet", tmp_path, "test")


def test_tiny_imagenet_without_training_images(tmp_path):
    files = {name: content for name, content in tiny_imagenet_files().items() if not name.startswith("train")}
    write_zip(tmp_path / "tiny-imagenet-200.zip", files)
    with pytest.raises(InputError, match=r"200.zip/.*/train has no readable images in folders"):
        load_images("tiny_imagenet", tmp_path, "train")


def test_two_zips(tmp_path):
    for name in ("tiny-imagenet-200.zip", "tiny-imagenet-200-part.zip"):
        write_zip(tmp_path / name, tiny_imagenet_files())
    with pytest.raises(InputError, match=r"several zips \(tiny-imagenet-200-part.zip, .*\). Give one"):
        load_images("tiny_imagenet", tmp_path, "test")


# Looking for it


def held_by(folder: Path) -> set[str]:
    return {name for name in DATASETS if holds(name, folder)} - {"digits"}


def write_splits(folder: Path, classes, suffixes=("", "")) -> Path:
    for split, suffix in zip(("train", "test"), suffixes, strict=True):
        path = write_folder(folder / split, classes, 1)
        if suffix:
            pack(path)
    return folder


def test_image_files_are_told_by_their_classes(tmp_path):
    assert held_by(write_splits(tmp_path / "ten", CIFAR10)) == {"cifar10", "folder"}
    assert held_by(write_splits(tmp_path / "tars", CIFAR10, (".tar", ".tar"))) == {"cifar10", "folder"}
    assert held_by(write_splits(tmp_path / "hundred", [f"{i:02}" for i in range(100)])) == {"cifar100", "folder"}
    assert held_by(write_splits(tmp_path / "two", ("a", "b"))) == {"folder"}
    assert held_by(write_splits(tmp_path / "one", ("a",))) == set()


def test_a_split_alone_is_no_dataset(tmp_path):
    for split in ("train", "test"):
        write_folder(tmp_path / split / split, CIFAR10, 1)
        assert held_by(tmp_path / split) == set()


def test_broken_files_are_not_held(tmp_path, offline):
    path = write_mnist(tmp_path, [3, 1, 4], 3) / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    assert held_by(tmp_path) == {"mnist"}
    path.write_bytes(path.read_bytes()[:-100])
    assert held_by(tmp_path) == set()
    assert held_by(tmp_path / "absent") == set()
    (write_splits(tmp_path / "tars", CIFAR10, (".tar", ".tar")) / "test.tar").write_bytes(b"no tar")
    assert held_by(tmp_path / "tars") == set()


def test_tiny_imagenet_is_held_by_its_zip_and_folder(tmp_path):
    write_zip(tmp_path / "tiny-imagenet-200.zip", tiny_imagenet_files())
    (tmp_path / "other" / "tiny-imagenet-200").mkdir(parents=True)
    assert held_by(tmp_path) == held_by(tmp_path / "other") == {"tiny_imagenet"}
    write_zip(tmp_path / "tiny-imagenet-200-part.zip", tiny_imagenet_files())
    assert held_by(tmp_path) == set()


def test_real_data_are_held():
    assert "mnist" in held_by(real_data("MNIST"))
    assert held_by(real_data("cifar10-jpeg") / "cifar10-jpeg") == {"cifar10", "folder"}
    assert held_by(real_data("tiny-imagenet") / "tiny-imagenet") == {"tiny_imagenet"}


# Holding out


def test_hold_out_is_exact_in_every_class():
    labels = torch.tensor([0] * 40 + [1] * 20 + [2] * 10)[
        torch.randperm(70, generator=torch.Generator().manual_seed(0))
    ]
    images = Images(torch.arange(70, dtype=torch.uint8).view(-1, 1, 1, 1), labels, ("a", "b", "c"), "Counted")
    training, held_out = hold_out(images, 0.2, seed=0)
    assert held_out.labels.bincount().tolist() == [8, 4, 2]
    assert training.labels.bincount().tolist() == [32, 16, 8]
    indices = [part.images.flatten().tolist() for part in (training, held_out)]
    assert sorted(indices[0] + indices[1]) == list(range(70))
    for part, index in zip((training, held_out), indices, strict=True):
        assert index == sorted(index)
        assert torch.equal(part.labels, labels[index])


def test_hold_out_goes_by_seed():
    images = numbered(100)
    first, again, other = (hold_out(images, 0.1, seed=seed)[1] for seed in (7, 7, 8))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)


@pytest.mark.parametrize("fraction", [0, 1, -0.5, float("nan")])
def test_hold_out_fraction(fraction):
    with pytest.raises(InputError, match=rf"held-out fraction {fraction} is not allowed\. Use a number above 0"):
        hold_out(numbered(100), fraction, seed=0)


@pytest.mark.parametrize("fraction", [0.1, 0.9])
def test_hold_out_that_leaves_nothing(fraction):
    with pytest.raises(InputError, match=r"of 5 images in 5 classes leaves one part empty\. Use a fraction closer"):
        hold_out(numbered(5), fraction, seed=0)


def test_to_float():
    assert to_float(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == [0.0, pytest.approx(0.2), 1.0]
