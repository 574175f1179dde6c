"""GradMix: contrastive pretraining that hides what the network already relies on, and what its features know.

Three rooms: this package is the method itself (attribution and mixing, for any training loop),
``gradmix.ssl`` the pretraining, ``gradmix.eval`` kNN, linear probe and open-set scoring.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from gradmix.attribution import layercam
    from gradmix.gradmix import GradMix
    from gradmix.mixer import Mixed, Mixer
    from gradmix.mixing import MIXERS, CutMix, FMix, MixUp, ResizeMix
    from gradmix.ssl.networks.backbones import Backbone

__all__ = ["MIXERS", "CutMix", "FMix", "GradMix", "MixUp", "Mixed", "Mixer", "ResizeMix", "layercam", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Imported when it is asked for (PEP 562): torch takes seconds, and a command's --help needs none of it.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module("gradmix.attribution" if name == "layercam" else "gradmix.mixing"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load(run: "str | Path") -> "Backbone":
    """The pretrained backbone of a run's folder, or of a detector's, ready for features.

    Args:
        run: path of a run (it holds ``backbone.safetensors``) or of its ``detector/`` folder.

    Returns:
        A module in eval mode: ``model(images)`` takes float images ``[N, 3, H, W]`` in [0, 1] or uint8 and gives
        features ``[N, F]``; ``model.transform(image)`` turns a PIL image or a path into such an image.
    """
    from gradmix.ssl.networks.backbones import load_backbone  # only here: the method itself must not import the trainer

    return load_backbone(run)
