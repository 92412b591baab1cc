"""The adversarial images of an evaluation: kept while they are found, one an example, and saved together."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..digests import sha256_of
from ..errors import InputError
from ..files import written_whole

ADVERSARIAL = ".adversarial.safetensors"  # the suffix of the file with the images, beside a result's .json


@dataclass(frozen=True)
class Adversarial:
    """For each example that is classified right and that something broke, the image that broke it first.

    Attributes:
        index: int64 [M], positions of these examples among all, ascending.
        images: float32 [M, C, H, W] in [0, 1], in the ball, as they were judged.
    """

    index: Tensor
    images: Tensor

    def save(self, path: Path, identity: Mapping[str, Any]) -> str:
        """Write "index" and "images" as safetensors, atomically; the same content gives the same bytes.

        Args:
            path: Of the file.
            identity: What the images were found on and how; it goes into the metadata's "identity", as JSON: fields
                of their own would be written in another order each time.

        Returns:
            sha256 of the file.
        """
        with written_whole(path) as beside:
            tensors = {"index": self.index, "images": self.images}
            save_file(tensors, beside, metadata={"identity": json.dumps(dict(identity))})
            return sha256_of(beside)


def write_images(path: Path, images: Mapping[int, Tensor]) -> None:
    """Keep an image an example in a file; on disk before this returns.

    Example i lies at i times the size of an image and nothing is written between, so the file is sparse, and what a
    killed process wrote of an example is written over when the example is measured again.

    Args:
        path: Of the file; what it holds of other examples stays.
        images: By example, float32 [C, H, W] on the CPU.
    """
    path.touch()
    with path.open("r+b") as file:
        for example, image in images.items():
            values = image.contiguous().numpy()
            file.seek(example * values.nbytes)
            file.write(values.data)
        file.flush()
        os.fsync(file.fileno())


def read_images(path: Path, images: Mapping[int, Tensor]) -> None:
    """Fill tensors with what `write_images` kept.

    Args:
        path: Of the file.
        images: What to fill by example, float32 [C, H, W].

    Raises:
        InputError: A file that is not there, or is cut.
    """
    try:
        with path.open("rb") as file:
            for example, image in images.items():
                file.seek(example * image.nbytes)
                if file.readinto(image.numpy().data) < image.nbytes:
                    raise EOFError("it is cut")
    except (OSError, EOFError) as error:
        raise InputError(f"{path} cannot be read ({error}); delete {path.parent} to evaluate anew") from error
