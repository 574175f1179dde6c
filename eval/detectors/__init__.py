"""Open-set detectors: one contract (`base.Detector`), scores that are higher for more unknown images."""

from pathlib import Path

from gradmix.eval.detectors.base import Detector
from gradmix.eval.detectors.class_knn import ClassKNN
from gradmix.eval.detectors.class_mean import ClassMean
from gradmix.eval.detectors.confidence import GEN, MSP, Energy, MaxLogit
from gradmix.eval.detectors.deep_knn import DeepKNN
from gradmix.eval.detectors.fdbd import FDBD
from gradmix.eval.detectors.gaussian_mixture import GaussianMixture
from gradmix.eval.detectors.mahalanobis import Mahalanobis, RelativeMahalanobis
from gradmix.eval.detectors.mean_shift import MeanShift
from gradmix.eval.detectors.nci import NCI
from gradmix.eval.detectors.nnguide import NNGuide
from gradmix.eval.detectors.shaped import ASH, ReAct, Scale
from gradmix.eval.detectors.store import read_manifest
from gradmix.eval.detectors.vim import ViM
from gradmix.registry import Registry

KINDS = (
    DeepKNN,
    ClassKNN,
    ClassMean,
    Mahalanobis,
    RelativeMahalanobis,
    ViM,
    NNGuide,
    GaussianMixture,
    MeanShift,
    MSP,
    MaxLogit,
    Energy,
    GEN,
    ReAct,
    ASH,
    Scale,
    FDBD,
    NCI,
)
DETECTORS: Registry[type[Detector]] = Registry("gradmix.detectors", {kind.NAME: kind for kind in KINDS})

# On backbone features, the reference that claims are made with; `primary=` says what detector/ holds.
PRIMARY = DeepKNN.NAME

__all__ = ["DETECTORS", "PRIMARY", "Detector", "load", *(kind.__name__ for kind in KINDS)]


def load(folder: str | Path, mmap: bool = False) -> Detector:
    """The detector that `.save(folder)` wrote, of whichever kind; arguments and errors as `Detector.load`."""
    name = read_manifest(Path(folder)).detector
    return DETECTORS.pick(f"{folder}: detector", name).load(folder, mmap=mmap)
