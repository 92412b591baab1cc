"""Replacement for the package ``autoattack`` that `drelu_timm.robustbench` installs where it is missing.

robustbench 1.1.1 depends on pyautoattack (the same attacks, on PyPI) but imports autoattack
(https://github.com/fra31/auto-attack, not on PyPI). This module only translates the arguments.
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyautoattack
import torch
from torch import Tensor, nn

from ..errors import InputError


class AutoAttack(pyautoattack.AutoAttack):
    """AutoAttack (Croce and Hein 2020, https://arxiv.org/abs/2003.01690) with the arguments of ``autoattack``.

    Args:
        model: Maps [0, 1] images to logits.
        norm: "Linf", "L2" or "L1".
        eps: Radius, in units of a [0, 1] pixel.
        seed: Seed of every attack; by default the clock's.
        verbose: Print progress.
        attacks_to_run: Names of the attacks, only for ``version="custom"``.
        version: "standard", "plus", "rand" or "custom".
        device: Device of the attacks.
        log_path: File to which progress is appended.
    """

    def __init__(
        self,
        model: nn.Module,
        norm: str = "Linf",
        eps: float = 0.3,
        seed: int | None = None,
        verbose: bool = True,
        attacks_to_run: Sequence[str] = (),
        version: str = "standard",
        device: str | torch.device = "cuda",
        log_path: str | Path | None = None,
    ):
        attacks = list(attacks_to_run) or None
        super().__init__(model, attacks=attacks, device=device, eps=eps, norm=norm, seed=seed, version=version)  # pyright: ignore[reportArgumentType]
        self.verbose = verbose
        self.log_path = log_path

    def run_standard_evaluation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x_orig: Tensor, y_orig: Tensor, bs: int = 250, state_path: Path | None = None
    ) -> Tensor:
        """Attack images [N, C, H, W] in [0, 1] with labels [N]; return the adversarial images in the same order.

        Raises:
            InputError: A ``state_path``, because pyautoattack cannot read the state that it saves.
        """
        if state_path is not None:
            raise InputError(
                f"state_path={str(state_path)!r}: pyautoattack cannot resume from a saved state. "
                "Leave it out (benchmark: aa_state_path)."
            )
        with self._progress():
            adversarial, _ = super().run_standard_evaluation(x_orig, y_orig, batch_size=bs)
        return adversarial

    @contextmanager
    def _progress(self) -> Iterator[None]:
        """Print what pyautoattack logs, as autoattack does."""
        level = self.logger.level
        handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)] if self.verbose else []
        if self.log_path is not None:
            handlers.append(logging.FileHandler(self.log_path))
        for handler in handlers:
            self.logger.addHandler(handler)
        try:
            self.logger.setLevel(logging.DEBUG)
            yield
        finally:
            self.logger.setLevel(level)
            for handler in handlers:
                self.logger.removeHandler(handler)
                handler.close()
