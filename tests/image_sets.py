"""Sets of image files in folders and tars, for the tests that read them."""

import io
import tarfile
from pathlib import Path

from PIL import Image

from drelu_timm.data.images import Images
from drelu_timm.data.readers import load_images


def encoded(image: Image.Image | int, format: str = "PNG", **options) -> bytes:
    """An image file; a number is an 8x8 image of that grey."""
    buffer = io.BytesIO()
    image = Image.new("RGB", (8, 8), (image,) * 3) if isinstance(image, int) else image
    image.save(buffer, format, **options)
    return buffer.getvalue()


def write(folder: Path, files: dict[str, bytes | int]) -> Path:
    """Files by their path; a number is a PNG of that grey."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(content) if isinstance(content, int) else content)
    return folder


def write_splits(folder: Path, files: dict[str, bytes | int]) -> Path:
    """The same files in train and val."""
    for split in ("train", "val"):
        write(folder / split, files)
    return folder


def pack(folder: Path, called: str | None) -> None:
    """Turn train and val into tars of what is in them, or of the folder itself, called so."""
    for split in ("train", "val"):
        with tarfile.open(folder / f"{split}.tar", "w") as tar:
            tar.add(folder / split, called and called.format(split))
        (folder / split).rename(folder / f"unpacked-{split}")


def read(folder: Path, split: str = "train", size: int = 8, **options) -> Images:
    return load_images("folder", folder, split, img_size=size, **options)


def greys(images: Images) -> list[tuple[int, str]]:
    """The grey and the class of every image, sorted."""
    values = images.images[:, 0, 0, 0].tolist()
    return sorted(zip(values, (images.classes[label] for label in images.labels), strict=True))
