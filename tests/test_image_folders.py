"""Folders and tars of images: which files are read, their labels, and what is printed about the others."""

import tarfile
import zipfile
from pathlib import Path
from unicodedata import normalize

import pytest
import torch
from image_sets import encoded, greys, pack, read, write, write_splits
from launching import config, image_folder
from PIL import Image

from drelu_timm.data.image_files import formats
from drelu_timm.data.readers import holds, load_images
from drelu_timm.errors import InputError
from drelu_timm.evaluate import evaluate
from drelu_timm.evaluation.config import EvaluateConfig
from drelu_timm.files import read_json
from drelu_timm.train import train

FLAT = {"cat/1.png": 10, "cat/2.png": 20, "cat/3.png": 30, "dog/1.png": 40, "dog/2.png": 50, "dog/3.png": 60}
NESTED = {
    "cat/2019/1.png": 10,
    "cat/2019/2.png": 20,
    "cat/2020/1.png": 30,
    "dog/2019/1.png": 40,
    "dog/2020/a/1.png": 50,
    "dog/2020/b/1.png": 60,
}
LABELLED = [(10, "cat"), (20, "cat"), (30, "cat"), (40, "dog"), (50, "dog"), (60, "dog")]


# Which class


@pytest.mark.parametrize("called", [None, ".", "{}", "./{}", "data/{}", "/abs/data/{}", "../{}"])
@pytest.mark.parametrize("files", [FLAT, NESTED], ids=["flat", "nested"])
def test_the_class_is_the_top_folder_in_a_folder_and_in_every_tar_of_it(tmp_path, files, called):
    folder = read(write_splits(tmp_path, files))
    assert folder.classes == ("cat", "dog")
    assert greys(folder) == LABELLED
    if called is not None:
        pack(tmp_path, called)
        tar = read(tmp_path)
        assert torch.equal(tar.images, folder.images)
        assert torch.equal(tar.labels, folder.labels)
    assert holds("folder", tmp_path)


def test_flat_and_nested_decode_to_the_same(tmp_path):
    flat, nested = read(write_splits(tmp_path / "flat", FLAT)), read(write_splits(tmp_path / "nested", NESTED))
    assert torch.equal(flat.images, nested.images)
    assert torch.equal(flat.labels, nested.labels)


def test_only_a_folder_named_as_the_split_is_not_a_class(tmp_path):
    write_splits(tmp_path, {"animals/cat/1.png": 10, "animals/dog/1.png": 20})
    with pytest.raises(InputError, match=r"train has one class \(animals\). Give one folder for each of at least 2"):
        read(tmp_path)
    assert not holds("folder", tmp_path)


def test_a_test_set_without_labels_names_val(tmp_path):
    write_splits(tmp_path, FLAT)
    write(tmp_path / "test", {"1.png": 10})
    with pytest.raises(
        InputError, match=r"Put one folder per class there\. To use .*/val as the test set, rename test\."
    ):
        read(tmp_path, "test")


@pytest.mark.parametrize("name", ["train.tar.gz", "train.tgz", "train.zip"])
def test_a_compressed_archive_is_named(tmp_path, name):
    write_splits(tmp_path, FLAT)
    (tmp_path / "train").rename(tmp_path / name)
    with pytest.raises(InputError, match=rf"has no train, but {name}\. Unpack it: only \.tar files that are not comp"):
        read(tmp_path)


@pytest.mark.parametrize("packed", [False, True])
def test_a_class_name_is_the_same_however_its_accents_are_stored(tmp_path, packed):
    names = [normalize(form, "é") for form in ("NFC", "NFD")]
    for split, name in zip(("train", "val"), names, strict=True):
        write(tmp_path / split, {f"{name}/1.png": 10, "dog/1.png": 20})
    if packed:
        pack(tmp_path, ".")
    assert read(tmp_path).classes == read(tmp_path, "test").classes == ("dog", names[0])


def test_classes_are_numbered_in_natural_order(tmp_path):
    names = ["10", "2", "b", "A", "a"]
    assert read(write_splits(tmp_path, {f"{name}/1.png": 0 for name in names})).classes == ("2", "10", "A", "a", "b")


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("lacking", "message"),
    [
        ("val", "only {}/train has dog). Rename"),
        ("train", "only {}/val has dog). Rename"),
    ],
)
def test_classes_that_differ_between_the_splits(tmp_path, split, lacking, message):
    write_splits(tmp_path, {"cat/1.png": 0, "cow/1.png": 0, "dog/1.png": 0})
    (tmp_path / lacking / "dog" / "1.png").unlink()
    (tmp_path / lacking / "dog").rmdir()
    with pytest.raises(InputError) as error:
        read(tmp_path, split)
    assert message.format(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_cifar100_has_the_same_classes_in_both_splits(tmp_path):
    write_splits(tmp_path, {f"{i:03}/1.png": 0 for i in range(100)})
    assert len(load_images("cifar100", tmp_path, "test").classes) == 100
    (tmp_path / "train" / "007").rename(tmp_path / "train" / "bond")
    with pytest.raises(InputError, match=r"only .*/val has 007; only .*/train has bond\)"):
        load_images("cifar100", tmp_path, "test")


def test_training_needs_no_test_set(tmp_path):
    assert greys(read(write(tmp_path, {f"train/{name}": content for name, content in FLAT.items()}))) == LABELLED


# Which files


STRAY = {
    ".DS_Store": b"",
    "classes.txt": b"cat dog",
    "README": b"",
    "loose.png": 70,
    "cat/._1.png": b"resource fork",
    "cat/.ipynb_checkpoints/1-checkpoint.png": 80,
    "cat/notes.TXT": b"",
    "__MACOSX/cat/1.png": b"",
    ".ipynb_checkpoints/1.png": 90,
}


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_not_read_is_counted(tmp_path, capsys, packed):
    write_splits(tmp_path, {**FLAT, **STRAY})
    if packed:
        pack(tmp_path, ".")
    for split, path in (("train", "train"), ("test", "val")):
        assert greys(read(tmp_path, split)) == LABELLED
        path = tmp_path / (path + ".tar" * packed)
        error = capsys.readouterr().err
        assert error.startswith(f"{split}: 6 images in 2 classes ({path}), 9 files ignored (5 hidden, 2 .txt, ")
        assert {"1 without extension", "1 outside the class folders"} == set(error.strip()[:-1].split(", ")[-2:])


def test_nothing_is_said_of_files_that_are_not_there(tmp_path, capsys, monkeypatch):
    read(write_splits(tmp_path, FLAT))
    assert capsys.readouterr().err == f"train: 6 images in 2 classes ({tmp_path / 'train'})\n"
    monkeypatch.setenv("RANK", "1")
    read(tmp_path)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("suffix", ["webp", "bmp", "tif", "TIFF", "gif", "PNG", "JPG", "jpe", "ppm", "tga", "jp2"])
def test_every_extension_that_pillow_reads_is_read(tmp_path, suffix):
    format = formats()[f".{suffix.lower()}"]
    cat, dog = (encoded(Image.new("RGB", (16, 16), (grey,) * 3), format) for grey in (51, 204))
    images = read(write_splits(tmp_path, {f"cat/1.{suffix}": cat, f"dog/1.{suffix}": dog}))
    assert [label for _, label in greys(images)] == ["cat", "dog"]
    assert [grey for grey, _ in greys(images)] == pytest.approx([51, 204], abs=2)


def test_what_pillow_cannot_decode_is_not_taken_for_an_image():
    assert not {".mpg", ".h5", ".pdf", ".txt", ".npy", ".tar"} & formats().keys()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"1.png": 0}, r"no readable images in folders \(ignored files: 1 outside the class folders\). Put one folder"),
        ({"cat/1.heic": b""}, r"no readable images in folders \(ignored files: 1 .heic\). Put one folder"),
        ({"cat/1.png": 0, "dog/1.heic": b""}, r"folders without a readable image \(dog; ignored files: 1 .heic\)"),
    ],
    ids=["no folders", "no images", "a folder without"],
)
@pytest.mark.parametrize("packed", [False, True])
def test_classes_without_images(tmp_path, files, message, packed):
    write_splits(tmp_path, files)
    if packed:
        pack(tmp_path, ".")
    with pytest.raises(InputError, match=message):
        read(tmp_path)
    assert not holds("folder", tmp_path)


def test_a_file_in_place_of_a_split(tmp_path):
    write(tmp_path, {"train": b"", "val/cat/1.png": 0})
    with pytest.raises(InputError, match=r"has no train. It must contain train \(or train.tar\)"):
        read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no tar" * 200])
def test_a_tar_that_is_none(tmp_path, content):
    with pytest.raises(InputError, match=r"train.tar cannot be read as a tar \(.*\). Make it readable or replace it"):
        read(write(tmp_path, {"train.tar": content}))


@pytest.mark.parametrize("kept", [0, 100, 512], ids=["between files", "in a header", "in a file"])
def test_a_tar_that_is_cut_short_anywhere(tmp_path, kept):
    write_splits(tmp_path, FLAT)
    pack(tmp_path, ".")
    path = tmp_path / "train.tar"
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    path.write_bytes(path.read_bytes()[: last.offset + kept])
    with pytest.raises(InputError, match=r"train.tar cannot be read as a tar \(.*\). Make it readable or replace it"):
        read(tmp_path)


# Links, and what cannot be listed


def test_links_to_folders_and_files_are_followed(tmp_path):
    write(tmp_path, {f"store/{name}": content for name, content in FLAT.items()})
    for split in ("train", "val"):
        (tmp_path / split / "dog").mkdir(parents=True)
        (tmp_path / split / "cat").symlink_to(tmp_path / "store" / "cat")
        for name in ("1", "2", "3"):
            (tmp_path / split / "dog" / f"{name}.png").symlink_to(tmp_path / "store" / "dog" / f"{name}.png")
    assert greys(read(tmp_path)) == LABELLED


def test_hard_links_in_a_tar_are_images(tmp_path):
    write_splits(tmp_path, FLAT)
    for split in ("train", "val"):
        (tmp_path / split / "dog" / "4.png").hardlink_to(tmp_path / split / "cat" / "1.png")
    pack(tmp_path, ".")
    assert greys(read(tmp_path)) == sorted([*LABELLED, (10, "dog")])


@pytest.mark.parametrize("target", ["elsewhere/1.png", "cat", "9.png"], ids=["outside", "folder", "itself"])
def test_links_that_a_tar_cannot_follow(tmp_path, target):
    write_splits(tmp_path, FLAT)
    (tmp_path / "train" / "9.png").symlink_to(target)
    pack(tmp_path, ".")
    with pytest.raises(InputError, match=r"9.png .*link|train.tar cannot be read as a tar"):
        read(tmp_path)


def test_a_link_to_a_folder_around_it(tmp_path):
    write_splits(tmp_path, FLAT)
    (tmp_path / "train" / "cat" / "again").symlink_to(tmp_path / "train")
    with pytest.raises(InputError, match=r"train/cat/again is a link to a folder that contains it. Remove the link"):
        read(tmp_path)


def test_a_link_that_leads_nowhere(tmp_path):
    write_splits(tmp_path, FLAT)
    (tmp_path / "train" / "cat" / "4.png").symlink_to("absent.png")
    with pytest.raises(InputError, match=r"cat/4.png in .*train is not a complete image \(.*No such file"):
        read(tmp_path)


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    from drelu_timm.data import image_files

    scandir = image_files.os.scandir

    def denied(path):
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(image_files.os, "scandir", denied)
    with pytest.raises(InputError, match=r"train cannot be read as a folder \(.*denied: '.*train/dog'\). Make it rea"):
        read(write_splits(tmp_path, FLAT))


def test_of_members_of_one_name_the_last_counts(tmp_path):
    write_splits(tmp_path, FLAT)
    pack(tmp_path, ".")
    changed = write(tmp_path / "changed", {"1.png": 15}) / "1.png"
    with tarfile.open(tmp_path / "train.tar", "a") as tar:
        tar.add(changed, "cat/1.png")
    assert greys(read(tmp_path)) == [(15, "cat"), *LABELLED[1:]]


# TinyImageNet


def write_tiny_imagenet(folder: Path, changes: dict[str, bytes | int | None] | None = None) -> Path:
    """A zip with two classes, of one training and one validation image each; None takes a file away."""
    files = {
        "wnids.txt": b"n02\nn01\n",
        "train/n01/images/n01_0.JPEG": 10,
        "train/n02/images/n02_0.JPEG": 20,
        "val/images/val_0.JPEG": 30,
        "val/images/val_1.JPEG": 40,
        "val/val_annotations.txt": b"val_0.JPEG\tn02\t0\t0\t1\t1\nval_1.JPEG\tn01\t0\t0\t1\t1\n",
        **(changes or {}),
    }
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "tiny-imagenet-200.zip", "w") as archive:
        archive.writestr("__MACOSX/._tiny-imagenet-200", b"")
        for name, content in files.items():
            if content is not None:
                content = encoded(content) if isinstance(content, int) else content
                archive.writestr(f"tiny-imagenet-200/{name}", content)
    return folder


def test_tiny_imagenet_ignores_and_counts(tmp_path, capsys):
    strays = ("train/n01/images/._n01_0.JPEG", "train/n01/n01_boxes.txt", "train/.DS_Store", "val/images/.x.JPEG")
    write_tiny_imagenet(tmp_path, {**dict.fromkeys(strays, b""), "val/images/val_9.JPEG": 0})
    train, test = (load_images("tiny_imagenet", tmp_path, split, img_size=8) for split in ("train", "test"))
    assert greys(train) == [(10, "n01"), (20, "n02")]
    assert greys(test) == [(30, "n02"), (40, "n01")]
    lines = capsys.readouterr().err.splitlines()
    path = tmp_path / "tiny-imagenet-200.zip" / "tiny-imagenet-200"
    assert lines[0] == f"train: 2 images in 2 classes ({path / 'train'}), 3 files ignored (2 hidden, 1 .txt)"
    assert lines[1].startswith(f"test: 2 images in 2 classes ({path}), 2 files ignored (1 ")
    assert "1 not in val_annotations.txt" in lines[1]


@pytest.mark.parametrize(
    ("changes", "split", "message"),
    [
        ({"train/n03/images/n03_0.JPEG": 0}, "train", r"only .*/train has n03\). Rename"),
        ({"train/n02/images/n02_0.JPEG": None}, "train", r"only wnids.txt has n02\). Rename"),
        ({"wnids.txt": b"n01\nn02\nn03\n"}, "test", r"only wnids.txt has n03\). Rename"),
        (
            {"val/images/val_1.JPEG": None},
            "test",
            r"lacks 1 of the images that val/val_annotations.txt lists \(val",
        ),
        (
            {"val/val_annotations.txt": b"val_0.JPEG\n"},
            "test",
            r"a line of val/val_annotations.txt has fewer than 2",
        ),
    ],
    ids=["class too many", "class without images", "class without validation", "image missing", "line cut short"],
)
def test_tiny_imagenet_of_other_files(tmp_path, changes, split, message):
    write_tiny_imagenet(tmp_path, changes)
    with pytest.raises(InputError, match=message):
        load_images("tiny_imagenet", tmp_path, split)


def test_a_superscript_in_a_name_is_not_a_number(tmp_path):
    assert read(write_splits(tmp_path, {"10\u00b2/1.png": 1, "2/1.png": 2})).classes == ("2", "10\u00b2")


def test_a_run_is_not_evaluated_on_classes_of_other_names(tmp_path):
    data = image_folder(tmp_path / "images")
    run = train(config(tmp_path / "run", epochs=1, **data))
    assert read_json(run / "config.json")["classes"] == ["a", "b"]
    evaluate(EvaluateConfig(str(run), eps="0.01", n_examples=4))
    for split in ("train", "test"):
        (tmp_path / "images" / split / "b").rename(tmp_path / "images" / split / "c")
    with pytest.raises(InputError, match=r"--data-dir .*images: class 1 is c, but RUN .*run was trained with b there"):
        evaluate(EvaluateConfig(str(run), eps="0.02", n_examples=4))
