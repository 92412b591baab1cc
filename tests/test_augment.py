import random

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as reference

from drelu_timm.data.augment import (
    BITS,
    Augmentation,
    augment,
    crop,
    cutmix,
    cutmix_box,
    cutout,
    flip,
    rand_augment,
)
from drelu_timm.errors import InputError
from drelu_timm.randomness import random_bits


def noise(n: int, *, channels: int = 3, side: int = 8) -> torch.Tensor:
    return torch.randint(
        0, 256, (n, channels, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def bits(n: int) -> np.ndarray:
    return random_bits(BITS * n, 0).reshape(BITS, n)


# One image at a time


@pytest.mark.parametrize(
    "augmentation",
    [Augmentation(crop_padding=2), Augmentation(flip=True), Augmentation(cutout=3), Augmentation(rand_augment="rand")],
)
def test_an_image_depends_on_its_own_bits_only(augmentation):
    images, drawn = noise(20), bits(20)
    whole = augment(images, augmentation, drawn)
    part = [17, 3, 4]
    assert (whole.shape, whole.dtype, whole.is_contiguous()) == (images.shape, torch.uint8, True)
    assert torch.equal(augment(images[part], augmentation, drawn[:, part]), whole[part])
    assert not torch.equal(whole, images)


@pytest.mark.parametrize(
    ("augmentation", "rows"),
    [
        (Augmentation(crop_padding=2), [0, 1]),
        (Augmentation(flip=True), [2]),
        (Augmentation(cutout=3), [3, 4]),
        (Augmentation(rand_augment="rand"), [5]),
    ],
)
def test_no_two_augmentations_share_bits(augmentation, rows):
    drawn = random_bits(BITS * 20, 1).reshape(BITS, 20)
    drawn[rows] = bits(20)[rows]
    assert torch.equal(augment(noise(20), augmentation, drawn), augment(noise(20), augmentation, bits(20)))


def test_no_augmentation():
    assert torch.equal(augment(noise(5), Augmentation(), bits(5)), noise(5))


@pytest.mark.parametrize("padding", [1, 4])
def test_crop(padding):
    images = noise(30)[:, :, :, :6]  # not square
    generator = torch.Generator().manual_seed(1)
    top, left = torch.randint(0, 2 * padding + 1, (2, 30), generator=generator)
    cropped = crop(images, top, left, padding=padding)
    for image, result, row, column in zip(images, cropped, top.tolist(), left.tolist(), strict=True):
        assert torch.equal(result, reference.crop(reference.pad(image, [padding]), row, column, 8, 6))


def test_crop_keeps_the_type():
    images = torch.rand(2, 3, 5, 6, dtype=torch.float64)
    zero, last = torch.tensor([0, 1]), torch.tensor([2, 1])
    cropped = crop(images, zero, last, padding=1)
    assert torch.equal(cropped[1], images[1])
    assert torch.equal(cropped[0, :, 1:, :-1], images[0, :, :-1, 1:])
    assert (cropped[0, :, 0] == 0).all()
    assert (cropped[0, :, :, -1] == 0).all()


def test_flip():
    images = noise(3)
    flipped = flip(images, torch.tensor([1, 0, 1]))
    assert torch.equal(flipped, torch.stack([images[0].flip(2), images[1], images[2].flip(2)]))


def test_cutout():
    images = torch.ones(3, 2, 8, 6)
    cut = cutout(images, torch.tensor([4, 0, 7]), torch.tensor([3, 0, 5]), side=4)
    expected = torch.ones(3, 2, 8, 6)
    expected[0, :, 2:6, 1:5] = 0
    expected[1, :, :2, :2] = 0
    expected[2, :, 5:, 3:] = 0
    assert torch.equal(cut, expected)
    assert images.min() == 1


def test_cutout_reaches_every_pixel_alike():
    images = torch.full((5000, 1, 6, 6), 255, dtype=torch.uint8)
    erased = augment(images, Augmentation(cutout=1), bits(5000)) == 0
    assert (erased.flatten(1).sum(1) == 1).all()
    assert ((erased.sum((0, 1)) - 5000 / 36).abs() < 55).all()  # 4.7 standard deviations


# CutMix


def test_cutmix_labels_are_shares_of_the_area():
    images, others = torch.zeros(2, 3, 8, 10), torch.ones(2, 3, 8, 10)
    labels, other_labels = torch.eye(3)[[0, 1]], torch.eye(3)[[2, 1]]
    mixed, soft = cutmix(images, labels, others, other_labels, (slice(1, 5), slice(0, 6)))
    assert mixed[:, :, 1:5, :6].min() == 1
    assert mixed.sum() == 2 * 3 * 24
    assert torch.allclose(soft, torch.tensor([[0.7, 0, 0.3], [0, 1, 0]]))


def test_cutmix_box():
    boxes = [cutmix_box(random_bits(4, 0, key), 32, 20, probability=0.5) for key in range(4000)]
    areas = [(rows.stop - rows.start) * (columns.stop - columns.start) / 640 for rows, columns in boxes]
    assert all(
        0 <= rows.start <= rows.stop <= 32 and 0 <= columns.start <= columns.stop <= 20 for rows, columns in boxes
    )
    # A box is whole where its centre is far from the border: with sides of sqrt(a), E[a (1 - sqrt(a) / 4)^2] = 0.331.
    assert abs(sum(areas) / 2000 - 0.331) < 0.04
    assert abs(sum(area == 0 for area in areas) / 4000 - 0.5) < 0.05


@pytest.mark.parametrize("probability", [0, 1])
def test_cutmix_probability(probability):
    boxes = {
        cutmix_box(random_bits(4, 0, key), 32, 32, probability=probability) != (slice(0, 0),) * 2 for key in range(9)
    }
    assert boxes == {bool(probability)}


# RandAugment


@pytest.mark.parametrize("channels", [1, 3])
def test_rand_augment_goes_by_its_seeds(channels):
    images, seeds = noise(1, channels=channels, side=16).expand(40, -1, -1, -1), random_bits(40, 0)
    augmented = rand_augment(images, "rand-m9-n2-mstd0.5", seeds)
    assert (augmented.shape, augmented.dtype) == (images.shape, torch.uint8)
    assert len({image.numpy().tobytes() for image in augmented}) > 20
    assert torch.equal(rand_augment(images, "rand-m9-n2-mstd0.5", seeds), augmented)
    assert not torch.equal(rand_augment(images, "rand-m9-n2-mstd0.5", seeds[::-1]), augmented)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("config", ["rand-p1-n30", "rand-p1-n30-inc1", "rand-n3-tweights"])
def test_rand_augment_of_every_operation(config, channels):
    images = noise(10, channels=channels, side=16)
    assert rand_augment(images, config, random_bits(10, 0)).shape == images.shape


def test_rand_augment_leaves_the_global_generators_alone():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    expected = random.random(), np.random.rand()  # noqa: NPY002
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    rand_augment(noise(2), "rand", random_bits(2, 0))
    assert (random.random(), np.random.rand()) == expected  # noqa: NPY002


# Bad input


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"cutout": -8}, "--cutout -8 is negative. Use the side in pixels, or 0 for none"),
        ({"cutmix": 1.5}, "--cutmix 1.5 is not a probability. Use a number from 0"),
        ({"cutmix": float("nan")}, "--cutmix nan is not a probability"),
        (
            {"rand_augment": "augmix"},
            r"--rand-augment 'augmix' is not a RandAugment of timm \(the form is .*\). Example",
        ),
        ({"rand_augment": "rand-x3"}, r"--rand-augment 'rand-x3' is not a RandAugment of timm \(the form is .*\)"),
        (
            {"rand_augment": "rand-n99-tweights"},
            r"--rand-augment 'rand-n99-tweights' is not .*\(Cannot take a larger sample",
        ),
        ({"rand_augment": "rand-tnone"}, r"--rand-augment 'rand-tnone' is not a RandAugment of timm \(.*\). Example"),
    ],
)
def test_values_that_are_not_allowed(option, message):
    with pytest.raises(InputError, match=message):
        Augmentation(**option)
