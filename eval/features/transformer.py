"""A pretrained backbone's features as a step of scikit-learn's pipelines."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from gradmix.eval.features.extraction import looked_at
from gradmix.ssl.networks.backbones import load_backbone


class Features(TransformerMixin, BaseEstimator):
    """Images to features ``[N, F]`` float32: ``make_pipeline(gradmix.Features("runs/mine"), LogisticRegression())``.

    Nothing is learned: ``fit`` only loads the weights.

    Args:
        run: path of a run, or of its ``detector/`` folder.
        batch_size: images per forward pass.
        device: where it computes, such as ``"cuda"``.

    Attributes:
        n_features_out_: F, after ``fit``.
    """

    def __init__(self, run: str | Path, batch_size: int = 256, device: str = "cpu"):
        self.run, self.batch_size, self.device = run, batch_size, device

    def fit(self, X: Any, y: Any = None) -> "Features":
        """Load the backbone; images and labels are not looked at.

        Raises:
            ValueError: no backbone there.
        """
        self.backbone_ = load_backbone(self.run).to(self.device)
        self.n_features_out_ = self.backbone_.num_features
        return self

    @torch.inference_mode()
    def transform(self, X: Sequence[Any] | np.ndarray) -> np.ndarray:
        """Features of files, PIL images or arrays (``[H, W]`` or ``[H, W, 3]``, uint8), or an array of them.

        Raises:
            ValueError: no image, or one that can't be read.
        """
        check_is_fitted(self)
        if not len(X):
            raise ValueError("X: expected at least one image, got none")
        looks = looked_at(list(X), self.backbone_.transform, self._look, self.batch_size)
        return np.concatenate([features.numpy() for _, features in looks if features is not None])

    @torch.inference_mode()
    def _look(self, images: torch.Tensor) -> torch.Tensor:
        return self.backbone_(images.to(self.device)).float().cpu()

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """``feature0``, ``feature1``, ..."""
        check_is_fitted(self)
        return np.array([f"feature{i}" for i in range(self.n_features_out_)], dtype=object)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        return tags
