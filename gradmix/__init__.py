"""GradMix: contrastive pretraining that hides what the network already relies on, and what its features know.

Three rooms: this package is the method itself (attribution and mixing, for any training loop),
``gradmix.ssl`` the pretraining, ``gradmix.eval`` kNN, linear probe and open-set scoring.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradmix.attribution import layercam
    from gradmix.eval.calls import evaluate, pretrain, score
    from gradmix.eval.features.transformer import Features
    from gradmix.gradmix import GradMix
    from gradmix.mixer import Mixed, Mixer
    from gradmix.mixing import MIXERS, CutMix, FMix, MixUp, ResizeMix
    from gradmix.ssl.networks.backbones import load_backbone as load

# Where each name is; those of the other rooms are only named here, so that the method itself never imports them.
WHERE = {
    **dict.fromkeys(("MIXERS", "CutMix", "FMix", "GradMix", "MixUp", "Mixed", "Mixer", "ResizeMix"), "gradmix.mixing"),
    "layercam": "gradmix.attribution",
    **dict.fromkeys(("pretrain", "evaluate", "score"), "gradmix.eval.calls"),
    "Features": "gradmix.eval.features.transformer",
    "load": "gradmix.ssl.networks.backbones:load_backbone",
}
__all__ = [
    "MIXERS",
    "CutMix",
    "FMix",
    "Features",
    "GradMix",
    "MixUp",
    "Mixed",
    "Mixer",
    "ResizeMix",
    "evaluate",
    "layercam",
    "load",
    "pretrain",
    "score",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Imported when it is asked for (PEP 562): torch takes seconds, and a command's --help needs none of it.
    if name not in WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, other_name = WHERE[name].partition(":")
    value = getattr(import_module(module), other_name or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
