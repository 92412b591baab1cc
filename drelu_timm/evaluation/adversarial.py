"""The adversarial images of an evaluation: kept while they are found, one an example, and saved together."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..digests import sha256_of
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
