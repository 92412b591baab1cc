import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from drelu_timm.data import generated as generated_module
from drelu_timm.data.generated import ORDER, GeneratedImages
from drelu_timm.errors import InputError

SORTED = np.repeat([0, 1, 2], [10, 4, 6])


def pixels(n: int, *, seed: int = 0, side: int = 4, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, channels), dtype=np.uint8)


def write(path: Path, labels: ArrayLike = SORTED, *, save=np.savez, **members: Any) -> Path:
    """A file of random images with these labels; members replace what it holds, None leaves one out."""
    labels = np.asarray(labels, dtype=np.int64)
    members = {"image": pixels(len(labels)), "label": labels, **members}
    save(path, **{name: member for name, member in members.items() if member is not None})
    return path


def opened(*paths: Path, img_size: int = 4, in_chans: int = 3, num_classes: int = 3) -> GeneratedImages:
    return GeneratedImages.open(paths, img_size=img_size, in_chans=in_chans, num_classes=num_classes)


def assert_reads(made: GeneratedImages, images: np.ndarray, labels: np.ndarray) -> None:
    index = np.random.default_rng(1).integers(0, len(labels), 50)
    read, read_labels = made.read(index)
    assert (read.dtype, read_labels.dtype, read.is_contiguous()) == (torch.uint8, torch.int64, True)
    assert np.array_equal(read.numpy(), images[index].transpose(0, 3, 1, 2))
    assert np.array_equal(read_labels.numpy(), labels[index])


# Reading


def test_one_file(tmp_path):
    made = opened(write(tmp_path / "a.npz"))
    assert len(made) == 20
    assert_reads(made, pixels(20), SORTED)


@pytest.mark.parametrize("sort", [True, False])
def test_parts_are_one_array(tmp_path, sort):
    parts = [np.random.default_rng(seed).integers(0, 3, n) for seed, n in enumerate((30, 1, 9))]
    parts = [np.sort(part) for part in parts] if sort else parts
    images = [pixels(len(part), seed=seed) for seed, part in enumerate(parts)]
    paths = [write(tmp_path / f"{i}.npz", part, image=images[i]) for i, part in enumerate(parts)]
    made = opened(*paths)
    assert len(made) == 40
    assert_reads(made, np.concatenate(images), np.concatenate(parts))
    drawn = made.drawn(np.arange(300), 0)
    assert set(drawn.tolist()) == set(range(40))
    assert np.concatenate(parts)[drawn].reshape(100, 3).min(0).tolist() == made.read(drawn[:3])[1].tolist()


def test_grey_images_and_small_labels(tmp_path):
    path = write(tmp_path / "a.npz", image=pixels(20, channels=1), label=SORTED.astype(np.uint8))
    assert_reads(opened(path, in_chans=1), pixels(20, channels=1), SORTED)


def test_compressed_file_is_converted_once(tmp_path, capsys):
    path = write(tmp_path / "a.npz", save=np.savez_compressed)
    assert_reads(opened(path), pixels(20), SORTED)
    copy = tmp_path / "a.stored.npz"
    assert f"{path} is compressed and needs an uncompressed copy, {copy} of 0.0 GB: writing it once" in (
        capsys.readouterr().err
    )
    assert sorted(tmp_path.iterdir()) == [tmp_path / ".a.stored.npz.verified", path, copy]
    written = copy.stat().st_mtime_ns
    assert_reads(opened(path), pixels(20), SORTED)
    assert copy.stat().st_mtime_ns == written
    assert capsys.readouterr().err == ""


def test_copy_of_another_file_is_made_again(tmp_path):
    opened(write(tmp_path / "a.npz", save=np.savez_compressed))
    path = write(tmp_path / "a.npz", save=np.savez_compressed, image=pixels(20, seed=5))
    assert_reads(opened(path), pixels(20, seed=5), SORTED)


@pytest.mark.parametrize("image", [pixels(20_000), pixels(20_000) // 128])  # deflate stores the first as it is
def test_conversion_that_fails_leaves_nothing(tmp_path, image):
    path = write(tmp_path / "a.npz", np.arange(20_000) % 3, save=np.savez_compressed, image=image)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 20] = bytes(20)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a.npz is not a complete .npz \(.*\)\. Copy or download it again"):
        opened(path)
    assert list(tmp_path.iterdir()) == [path]


def test_conversion_without_space(tmp_path, monkeypatch):
    path = write(tmp_path / "a.npz", save=np.savez_compressed)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"a.stored.npz of 0.0 GB, for which the disk has no space\. Free some, or"):
        opened(path)


def test_conversion_that_cannot_be_written(tmp_path, monkeypatch):
    path = write(tmp_path / "a.npz", save=np.savez_compressed)

    def copy_members(_archive, _members, temporary):
        temporary.write_text("a part")
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(generated_module, "_copy_members", copy_members)
    with pytest.raises(
        InputError, match=r"which cannot be written \(.*Read-only file system\)\. Save it with numpy.savez"
    ):
        opened(path)
    assert list(tmp_path.iterdir()) == [path]


def test_compressed_file_of_other_images_is_not_converted(tmp_path):
    path = write(tmp_path / "a.npz", save=np.savez_compressed)
    with pytest.raises(InputError, match=r"They must be uint8 \[N, 8, 8, 3\], like --dataset: resize them"):
        opened(path, img_size=8)
    assert list(tmp_path.iterdir()) == [path]


def test_images_are_mapped_not_copied(tmp_path):
    made = opened(write(tmp_path / "a.npz", np.arange(20_000) % 3, image=pixels(20_000, side=32)), img_size=32)
    before = anonymous_memory()
    for start in range(0, 20_000, 500):
        made.read(np.arange(start, start + 500))
    assert anonymous_memory() - before < 20e6  # of 61 MB


def anonymous_memory() -> int:
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared


def test_a_pickle_holds_the_place_of_the_images(tmp_path):
    made = opened(write(tmp_path / "a.npz", np.arange(20_000) % 3, image=pixels(20_000)))
    content = pickle.dumps(made)
    again = pickle.loads(content)
    assert len(content) < 7 * 20_000  # a label and a place in the order, and not the 48 bytes of an image
    assert again.digest == made.digest
    assert_reads(again, pixels(20_000), np.arange(20_000) % 3)
    assert np.array_equal(again.drawn(np.arange(100), 0), made.drawn(np.arange(100), 0))


def test_digest(tmp_path):
    digests = [
        opened(write(tmp_path / "a.npz")).digest,
        opened(write(tmp_path / "b.npz")).digest,
        opened(write(tmp_path / "c.npz", image=pixels(20, seed=1))).digest,
        opened(write(tmp_path / "d.npz", np.sort([*SORTED[1:], 2]))).digest,
        opened(write(tmp_path / "e.npz", [*SORTED, 2])).digest,
    ]
    assert digests[0] == digests[1] == "263831275de678ac0c92e8c1958da939bb74f26303d1640d9975576ba90c6227"
    assert len(set(digests)) == 4


# Order


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> GeneratedImages:
    return opened(write(tmp_path_factory.mktemp("generated") / "a.npz"))


@settings(max_examples=30)
@given(start=st.integers(0, 500), length=st.integers(1, 100), seed=st.integers(0, 9))
def test_every_window_is_balanced(made, start, length, seed):
    counts = np.bincount(SORTED[made.drawn(np.arange(start, start + length), seed)], minlength=3)
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize(("label", "count"), [(0, 10), (1, 4), (2, 6)])
def test_a_class_comes_without_replacement(made, label, count):
    drawn = made.drawn(np.arange(3 * 60), 7)
    cycles = drawn[SORTED[drawn] == label].reshape(-1, count)
    expected = np.flatnonzero(label == SORTED).tolist()
    assert len(cycles) == 60 // count
    assert all(sorted(cycle) == expected for cycle in cycles.tolist())
    assert len({tuple(cycle) for cycle in cycles.tolist()}) > 1


def test_order_is_a_function_of_seed_and_position(made):
    whole = made.drawn(np.arange(200), 3)
    places = np.array([150, 3, 77])
    assert np.array_equal(made.drawn(places, 3), whole[places])
    assert not np.array_equal(made.drawn(np.arange(200), 4), whole)
    assert np.array_equal(made.drawn(np.arange(200), 3), whole)


def test_every_class_and_pass_has_its_own_order(tmp_path):
    made = opened(write(tmp_path / "a.npz", np.repeat([0, 1, 2], 50)))
    drawn = np.concatenate([made.drawn(np.arange(300), seed) for seed in (0, 1)])
    orders = [drawn[drawn // 50 == label] % 50 for label in range(3)]
    assert len({tuple(order) for orders_of_class in orders for order in orders_of_class.reshape(4, 50)}) == 12


def test_order_is_the_one_that_a_state_names(made):
    """Where this changes, reword `ORDER`, so that a run is not resumed with another order."""
    assert ORDER == "a shuffle per class and pass"
    assert made.drawn(np.arange(12), 0).tolist() == [13, 16, 1, 11, 14, 3, 12, 15, 2, 10, 19, 4]


# Bad input


def test_no_files():
    with pytest.raises(InputError, match=r"--generated has no value\. Give one or more \.npz files"):
        opened()


def test_missing_part(tmp_path):
    with pytest.raises(InputError, match=r"--generated .*b.npz is not a file\. Give .npz files .* every part of them"):
        opened(write(tmp_path / "a.npz"), tmp_path / "b.npz")


def test_no_zip(tmp_path):
    (tmp_path / "a.npz").write_text("nothing")
    with pytest.raises(
        InputError, match=r"a.npz is not a complete .npz \(File is not a zip file\)\. Copy or download it"
    ):
        opened(tmp_path / "a.npz")


@pytest.mark.parametrize("keep", [slice(0, -30), slice(0, 200), slice(100, None)])
def test_cut_short(tmp_path, keep):
    path = write(tmp_path / "a.npz")
    path.write_bytes(path.read_bytes()[keep])
    with pytest.raises(InputError, match=r"a.npz is not a complete .npz \(.*\)\. Copy or download it again"):
        opened(path)


def test_member_cut_short(tmp_path):
    with zipfile.ZipFile(write(tmp_path / "a.npz")) as whole, zipfile.ZipFile(tmp_path / "b.npz", "w") as short:
        short.writestr("label.npy", whole.read("label.npy"))
        short.writestr("image.npy", whole.read("image.npy")[:-1])
    with pytest.raises(InputError, match=r"image.npy has 1087 bytes, but its header states another size"):
        opened(tmp_path / "b.npz")


def test_a_flipped_bit_in_stored_images_is_found_once_and_noted(tmp_path):
    path = write(tmp_path / "a.npz")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # in the images
    path.write_bytes(content)
    for _ in range(2):
        with pytest.raises(
            InputError, match=r"a.npz is not a complete .npz \(Bad CRC-32 for file 'image.npy'\)\. Copy"
        ):
            opened(path)


def test_a_file_is_verified_again_only_after_a_change(tmp_path, monkeypatch):
    path = write(tmp_path / "a.npz")
    opened(path)
    note = tmp_path / ".a.npz.verified"
    written = note.stat().st_mtime_ns
    opened(path)
    assert note.stat().st_mtime_ns == written
    os.utime(path, ns=(0, 0))
    opened(path)
    assert "changed at 0 ns" in note.read_text()


def test_a_folder_that_is_not_writable_is_read(tmp_path, monkeypatch):
    def write_text(path: Path, text: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(generated_module, "write_text", write_text)
    assert len(opened(write(tmp_path / "a.npz"))) == 20


def test_shortened_while_it_is_read(tmp_path):
    path = write(tmp_path / "a.npz")
    made = opened(path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match=r"a.npz was changed while it was read\. Restore it and resume"):
        made.read(np.arange(20))


@pytest.mark.parametrize("missing", ["image", "label"])
def test_missing_keys(tmp_path, missing):
    with pytest.raises(
        InputError, match=rf"has no {missing}.npy \(it has .*other.npy\)\. Give a .npz with image and label"
    ):
        opened(write(tmp_path / "a.npz", **{missing: None}, other=np.zeros(3)))


@pytest.mark.parametrize(
    "image",
    [pixels(20, side=5), pixels(20, channels=1), pixels(20).astype(np.float32), pixels(20)[..., 0]],
)
def test_images_of_another_kind(tmp_path, image):
    found = re.escape(f"images of {image.dtype} {list(image.shape)}. They must be uint8 [N, 4, 4, 3], like")
    with pytest.raises(InputError, match=found):
        opened(write(tmp_path / "a.npz", image=image))


def test_fortran_order(tmp_path):
    with pytest.raises(InputError, match=r"image.npy is in Fortran order"):
        opened(write(tmp_path / "a.npz", image=np.asfortranarray(pixels(20))))


def test_pickled_objects_are_not_read(tmp_path):
    with pytest.raises(InputError, match=r"labels of object .*\. They must be int64"):
        opened(write(tmp_path / "a.npz", label=np.array([{}] * 20, dtype=object)))


@pytest.mark.parametrize("label", [SORTED.astype(np.float32), np.eye(20, dtype=np.int64)])
def test_labels_of_another_kind(tmp_path, label):
    with pytest.raises(InputError, match=rf"labels of {label.dtype} \[20.*\]\. They must be int64 \[N\]"):
        opened(write(tmp_path / "a.npz", label=label))


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_outside_the_classes(tmp_path, label):
    path = write(tmp_path / "a.npz", [label, *SORTED])
    with pytest.raises(
        InputError, match=rf"has labels from {min(label, 0)} to {max(label, 2)}\. They must be from 0 to 2"
    ):
        opened(path)


def test_as_many_images_as_labels(tmp_path):
    with pytest.raises(InputError, match=r"has 19 images and 20 labels\. The numbers must be equal"):
        opened(write(tmp_path / "a.npz", image=pixels(19)))


def test_empty_file(tmp_path):
    with pytest.raises(InputError, match=r"has 0 images and 0 labels"):
        opened(write(tmp_path / "a.npz", []))


def test_pixels_scaled_to_one(tmp_path):
    with pytest.raises(InputError, match=r"--generated has pixels from 0 to 1, as floats in \[0, 1\] become in uint8"):
        opened(write(tmp_path / "a.npz", image=(pixels(20) / 255).round().astype(np.uint8)))


def test_class_without_an_image(tmp_path):
    with pytest.raises(InputError, match=r"--generated has no images of 2 of 5 classes \(3, 4\)\. Give every part"):
        opened(write(tmp_path / "a.npz"), num_classes=5)
