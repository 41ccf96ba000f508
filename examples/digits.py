"""Handwritten digits of 8 x 8 pixels, which scikit-learn ships: no download."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Batch = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Digits:
    """The digits in two parts that have no image in common.

    Attributes:
        images: (images, 8, 8, 1), float32 in [0, 1], for training.
        labels: (images,), int32.
        validation: Images and labels that are held out.
    """

    images: np.ndarray
    labels: np.ndarray
    validation: Batch

    def draw(self, seed: int, step: int, batch: int) -> Batch:
        """The batch of one step: any images, each moved by up to a pixel.

        It depends on nothing but the arguments, so every optimizer sees the same.
        """
        generator = np.random.default_rng((seed, step))
        chosen = generator.integers(len(self.images), size=batch)
        rows, columns = generator.integers(3, size=(2, batch, 1))
        rows, columns = rows + np.arange(8), columns + np.arange(8)
        padded = np.pad(self.images[chosen], [(0, 0), (1, 1), (1, 1), (0, 0)])
        image = np.arange(batch)[:, None, None]
        return padded[image, rows[:, :, None], columns[:, None, :]], self.labels[chosen]


def split_digits(held_out: int) -> Digits:
    """All digits in a fixed random order, so many of the first ones held out."""
    images, labels = all_digits()
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order], labels[order]
    return Digits(
        images[held_out:], labels[held_out:], (images[:held_out], labels[:held_out])
    )


def all_digits() -> Batch:
    """Images (1797, 8, 8, 1) in [0, 1] and their labels, from scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise SystemExit(
            'The digits come with scikit-learn: pip install -e ".[examples]"'
        ) from error
    images, labels = load_digits(return_X_y=True)
    scaled = images.reshape(-1, 8, 8, 1).astype(np.float32) / 16
    return scaled, labels.astype(np.int32)
