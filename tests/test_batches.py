import hashlib

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as reference

from drelu_timm.data.augment import Augmentation
from drelu_timm.data.batches import TrainingBatches
from drelu_timm.data.generated import GeneratedImages
from drelu_timm.data.images import Images
from drelu_timm.errors import InputError

CROP_AND_FLIP = Augmentation(crop_padding=2, flip=True)
ALL = Augmentation(crop_padding=2, flip=True, cutout=3, cutmix=0.5, rand_augment="rand-m5-n1-p1")


def numbered(n: int, *, channels: int = 3, side: int = 6, num_classes: int = 5) -> Images:
    """Random images whose labels go round the classes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, channels, side, side), dtype=torch.uint8, generator=generator)
    return Images(images, torch.arange(n) % num_classes, tuple("abcdefghij"[:num_classes]), "Random")


def replicate(image: Images, n: int) -> Images:
    return image[torch.zeros(n, dtype=torch.int64)]


def batches(images: Images, **options) -> TrainingBatches:
    return TrainingBatches(images, **{"batch_size": 12, "seed": 0, "augmentation": CROP_AND_FLIP, **options})


@pytest.fixture(scope="module")
def generated(tmp_path_factory) -> GeneratedImages:
    """35 images of each of 5 classes."""
    path = tmp_path_factory.mktemp("generated") / "a.npz"
    image = np.random.default_rng(9).integers(0, 256, (175, 6, 6, 3), dtype=np.uint8)
    np.savez(path, image=image, label=np.repeat(np.arange(5), 35))
    return GeneratedImages.open([path], img_size=6, in_chans=3, num_classes=5)


def mixed(generated: GeneratedImages, n: int = 50, fraction: float = 0.7, **options) -> TrainingBatches:
    return batches(numbered(n), generated=generated, generated_fraction=fraction, **options)


def equal(one, other) -> bool:
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("augmentation", "digest"),
    [
        (Augmentation(), "61e35d9cda590c6c346660fa2d1b3312deaf932508f373db7050092251e08eaf"),
        (CROP_AND_FLIP, "aa8ead3b07ba4e4e363e83220a86343107d0b303a0a4e868893bd0d2d442a9b8"),
    ],
)
def test_batches_are_those_of_earlier_versions(augmentation, digest):
    pixels = (torch.arange(50 * 3 * 8 * 8) * 7 % 251).to(torch.uint8).view(50, 3, 8, 8)
    made = batches(
        Images(pixels, torch.arange(50) % 10, tuple("0123456789"), "Counted"), seed=5, augmentation=augmentation
    )
    content = hashlib.sha256()
    for epoch, step in ((0, 0), (0, 3), (3, 1)):
        for tensor in made.batch(epoch, step):
            content.update(tensor.numpy().tobytes())
    assert content.hexdigest() == digest


def test_number_of_processes_does_not_matter():
    made = batches(numbered(50))
    for step in range(made.steps_per_epoch):
        images, labels = made.batch(3, step)
        for num_processes in (2, 3, 4):
            parts = [batches(numbered(50)).batch(3, step, index, num_processes) for index in range(num_processes)]
            assert torch.equal(torch.cat([part[0] for part in parts]), images)
            assert torch.equal(torch.cat([part[1] for part in parts]), labels)


def test_a_batch_is_a_function_of_seed_epoch_and_step():
    made = batches(numbered(50))
    once = {(epoch, step): made.batch(epoch, step)[0] for epoch in (0, 1, 2) for step in range(4)}
    for (epoch, step), images in reversed(once.items()):
        assert torch.equal(made.batch(epoch, step)[0], images)
    assert len({images.numpy().tobytes() for images in once.values()}) == 12


def test_every_stream_is_its_own():
    images = replicate(numbered(1), 36)  # the same image everywhere, so that only the augmentation differs
    keys = [(seed, epoch, step) for seed in (0, 1, 2) for epoch in (0, 1, 2) for step in (0, 1, 2)]
    made = {key: batches(images, seed=key[0]).batch(*key[1:])[0] for key in keys}
    assert len({batch.numpy().tobytes() for batch in made.values()}) == len(keys)


def test_an_epoch_shows_no_image_twice():
    images = Images(torch.arange(50, dtype=torch.uint8).view(-1, 1, 1, 1), torch.zeros(50).long(), ("a",), "Counted")
    made = batches(images, augmentation=Augmentation())
    assert made.steps_per_epoch == 4
    shown = [torch.cat([made.batch(epoch, step)[0] for step in range(4)]).flatten() * 255 for epoch in range(3)]
    for epoch in shown:
        assert len(epoch.round().unique()) == 48
    assert not torch.equal(shown[0], shown[1])
    assert len(torch.cat(shown).round().unique()) == 50  # what one epoch leaves out, another shows


def test_labels_stay_with_their_images():
    images = numbered(40, channels=1)
    made = batches(images, augmentation=Augmentation())
    batch, labels = made.batch(1, 2)
    assert batch.dtype == torch.float32
    for image, label in zip((batch * 255).round().to(torch.uint8), labels, strict=True):
        (index,) = (images.images == image).flatten(1).all(1).nonzero().flatten()
        assert images.labels[index] == label


def test_augmentation_is_that_of_torchvision():
    images = numbered(64, side=7)
    made = batches(images, batch_size=64, augmentation=Augmentation(2, flip=True))
    batch, _ = made.batch(0, 0)
    seen = set()
    plain = TrainingBatches(images, batch_size=64, seed=0).batch(0, 0)[0]
    for image, augmented in zip(plain, batch, strict=True):
        padded = reference.pad(image, [2])
        candidates = {
            (top, left, flip): reference.hflip(cropped) if flip else cropped
            for top in range(5)
            for left in range(5)
            for flip in (False, True)
            for cropped in [reference.crop(padded, top, left, 7, 7)]
        }
        (match,) = (key for key, value in candidates.items() if torch.equal(value, augmented))
        seen.add(match)
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(5))
    assert {flip for *_, flip in seen} == {False, True}


def test_crop_and_flip_are_uniform():
    image = torch.zeros(1, 1, 5, 5, dtype=torch.uint8)
    image[0, 0, 2, 2] = 255
    image[0, 0, 2, 3] = 51
    images = replicate(Images(image, torch.zeros(1).long(), ("a",), "Dot"), 4500)
    batch = batches(images, batch_size=4500, augmentation=Augmentation(1, flip=True)).batch(0, 0)[0]
    places = (batch == 1).flatten(1).float()
    assert (places.sum(1) == 1).all()
    counts = places.sum(0).view(5, 5)[1:4, 1:4]
    assert counts.sum() == 4500
    assert ((counts - 500).abs() < 100).all()  # 4.7 standard deviations
    dim = (batch - 0.2).abs() < 1e-6
    mirrored = dim.flatten(1).float().argmax(1) < places.argmax(1)
    assert abs(mirrored.float().mean() - 0.5) < 0.04


@pytest.mark.parametrize("batch_size", [0, 51])
def test_batch_size_that_does_not_fit(batch_size):
    with pytest.raises(InputError, match=f"--batch-size {batch_size} is not possible with 50 training images. Use 1"):
        batches(numbered(50), batch_size=batch_size)


def test_batch_size_that_does_not_divide():
    with pytest.raises(InputError, match=r"--batch-size 12 .* cannot be shared by 5 processes. Use a multiple of 5"):
        batches(numbered(50)).batch(0, 0, 0, 5)


def test_seed_below_zero():
    with pytest.raises(InputError, match="--seed -1 is negative"):
        batches(numbered(50), seed=-1)


def test_step_past_the_epoch():
    with pytest.raises(IndexError, match="step 4 of an epoch of 4 steps"):
        batches(numbered(50)).batch(0, 4)


# Mixed with generated images


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_share_of_every_process(generated, fraction, num_processes):
    made = mixed(generated, fraction=fraction, batch_size=40, augmentation=Augmentation())
    counts = []
    for index in range(num_processes):
        images, _ = made.batch(0, 0, index, num_processes)
        pixels = (images * 255).round().to(torch.uint8)
        is_real = (pixels[:, None] == made.images.images).flatten(2).all(2).any(1)
        counts.append(int((~is_real).sum()))
    assert sum(counts) == round(40 * fraction)
    assert max(counts) - min(counts) <= 1


def test_generated_fraction_keeps_the_size_of_an_epoch(generated):
    assert mixed(generated).steps_per_epoch == batches(numbered(50)).steps_per_epoch == 4


def test_images_of_a_mixed_batch(generated):
    made = mixed(generated, augmentation=Augmentation())
    images, labels = made.batch(2, 1)
    index = made.indices(2, 1)
    assert {name: len(each) for name, each in index.items()} == {"real": 4, "generated": 8}
    real = made.images[torch.tensor(index["real"])]
    others, other_labels = generated.read(np.array(index["generated"]))
    order = [0, 4, 5, 1, 6, 7, 2, 8, 9, 3, 10, 11]  # evenly: 8 of 12
    assert torch.equal((images * 255).round().to(torch.uint8), torch.cat([real.images, others])[order])
    assert torch.equal(labels, torch.cat([real.labels, other_labels])[order])


def test_real_images_come_without_replacement(generated):
    made = mixed(generated)
    drawn = [each for epoch in range(6) for step in range(4) for each in made.indices(epoch, step)["real"]]
    for start in (0, 48):  # 12 steps are a pass
        assert len(set(drawn[start : start + 48])) == 48
    assert drawn[:48] != drawn[48:]
    unmixed = [each for step in range(4) for each in batches(numbered(50)).indices(0, step)["real"]]
    assert drawn[:48] == unmixed


def test_pass_that_ends_within_a_batch(generated):
    made = mixed(generated, n=29, fraction=0.6)  # 24 images a pass, 5 real ones a batch
    keys = [(epoch, step) for epoch in range(8) for step in range(2)]
    drawn = [each for key in keys for each in made.indices(*key)["real"]]
    for start in (0, 24, 48):
        assert len(set(drawn[start : start + 24])) == 24
    once = [made.batch(*key) for key in keys]
    assert all(equal(made.batch(*key), batch) for key, batch in reversed(list(zip(keys, once, strict=True))))


def test_generated_images_come_without_replacement(generated):
    made = mixed(generated, n=240)
    drawn = [each for step in range(20) for each in made.indices(0, step)["generated"]]
    drawn += [each for step in range(20) for each in made.indices(1, step)["generated"]]
    assert sorted(drawn[:175]) == list(range(175))
    for step in range(20):
        labels = np.bincount(np.array(made.indices(0, step)["generated"]) // 35, minlength=5)
        assert labels.max() - labels.min() <= 1


@pytest.mark.parametrize("augmentation", [CROP_AND_FLIP, ALL])
def test_number_of_processes_does_not_matter_to_mixed_batches(generated, augmentation):
    made = mixed(generated, augmentation=augmentation)
    for epoch, step in ((0, 0), (0, 1), (5, 3)):
        whole = made.batch(epoch, step)
        for num_processes in (2, 3, 4):
            parts = [
                mixed(generated, augmentation=augmentation).batch(epoch, step, index, num_processes)
                for index in range(num_processes)
            ]
            assert equal([torch.cat(each) for each in zip(*parts, strict=True)], whole)


# CutMix


def test_cutmix_labels_say_what_is_in_the_image():
    flat = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 10, 10).repeat(8, 1, 1, 1)
    made = batches(
        Images(flat, torch.arange(40) % 5, tuple("abcde"), "Flat"), batch_size=40, augmentation=Augmentation(cutmix=1)
    )
    soft = set()
    for epoch in range(20):
        images, labels = made.batch(epoch, 0)
        assert (labels.shape, labels.dtype) == ((40, 5), torch.float32)
        pixels = (images * 255).round().long().flatten(1)
        shares = torch.stack([(pixels == label).float().mean(1) for label in range(5)], 1)
        assert torch.allclose(labels, shares, atol=1e-6)
        soft.add(labels.max(1).values.min().item())
    assert len(soft) > 10  # another box every time


def test_cutmix_in_some_batches():
    made = batches(numbered(120), augmentation=Augmentation(cutmix=0.5))
    hard = [bool((made.batch(epoch, step)[1].max(1).values == 1).all()) for epoch in range(6) for step in range(10)]
    assert 15 < sum(hard) < 45


# Loader


@pytest.mark.parametrize("workers", [0, 2])
def test_loader(generated, workers):
    made = mixed(generated, augmentation=ALL)
    state = torch.get_rng_state()
    loaded = list(made.loader(3, 1, process_index=1, num_processes=2, workers=workers))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(loaded) == 3
    for step, batch in enumerate(loaded, start=1):
        assert equal(batch, made.batch(3, step, 1, 2))


@pytest.mark.slow  # the worker imports everything again
def test_loader_with_a_spawned_worker(generated):
    made = mixed(generated)
    made.batch(0, 0)  # shuffles, in place, what a spawned process gets
    loader = made.loader(0, 2, workers=1)
    loader.multiprocessing_context = "spawn"
    for step, batch in enumerate(loader, start=2):
        assert equal(batch, made.batch(0, step))


def test_loader_past_the_last_step():
    assert list(batches(numbered(50)).loader(0, 4)) == []


def test_loader_whose_batches_cannot_be_shared():
    with pytest.raises(InputError, match="cannot be shared by 5 processes"):
        batches(numbered(50)).loader(0, num_processes=5, workers=2)


# Bad input


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5, float("nan")])
def test_fraction_outside_its_range(generated, fraction):
    with pytest.raises(InputError, match=f"--generated-fraction {fraction} is not allowed. Use a number of at least"):
        mixed(generated, fraction=fraction)


@pytest.mark.parametrize(("fraction", "kind"), [(0.01, "generated"), (0.99, "real")])
def test_fraction_that_leaves_one_kind(generated, fraction, kind):
    with pytest.raises(InputError, match=f"{fraction} of --batch-size 12 leaves no {kind} image in a batch. Use"):
        mixed(generated, fraction=fraction)


def test_fewer_generated_images_than_a_batch_needs(generated):
    with pytest.raises(InputError, match=r"needs 180 generated images per batch, and --generated has 175. Give more"):
        mixed(generated, n=300, fraction=0.9, batch_size=200)


def test_fraction_without_files():
    with pytest.raises(
        InputError, match=r"--generated-fraction 0.7 needs --generated, \.npz files\. Give both or none"
    ):
        mixed(None)


def test_files_without_a_fraction(generated):
    with pytest.raises(InputError, match=r"--generated needs --generated-fraction, such as 0\.7\. Give both or none"):
        mixed(generated, fraction=0.0)
