"""Detectors as a config names them: ``detectors=[NAME@SPACE, ...]`` and ``detector_options.NAME.PARAMETER=VALUE``."""

import dataclasses
from typing import Any

from gradmix.eval.detectors import DETECTORS, Detector
from gradmix.eval.features.search import SAVED, SAVED_KINDS
from gradmix.registry import nearest

# ClassKNN looks at the projections, as its authors do; every other detector at the backbone's features.
SPACES = {"class_knn": "projections"}


def build_detector(name: str, options: dict[str, dict[str, Any]]) -> Detector:
    """An unfitted detector with its part of ``detector_options``.

    Raises:
        ValueError: unknown detector or parameter, or a value of another type.
    """
    kind = DETECTORS.pick("detector_options", name)
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    given = options.get(name) or {}
    if not isinstance(given, dict):
        raise ValueError(f"detector_options.{name}: expected parameters, such as detector_options.deep_knn.k=10")
    for key, value in given.items():
        if key not in defaults:
            raise ValueError(f"detector_options.{name}.{key}: no such parameter; {nearest(key, defaults)}")
        expected = int if defaults[key] is None else type(defaults[key])
        if type(value) is not expected and not (expected is float and type(value) is int) and value != defaults[key]:
            raise ValueError(f"detector_options.{name}.{key}: expected {expected.__name__}, got {value!r}")
        if key == "index" and value not in ("auto", "Flat") and not SAVED.fullmatch(value):
            raise ValueError(f"detector_options.{name}.index: expected auto, Flat, {SAVED_KINDS}, got {value!r}")
    return kind(**given)


def parse_detector(entry: str, setting: str = "detectors") -> tuple[str, type[Detector], str]:
    """``NAME`` or ``NAME@features`` or ``NAME@projections`` to (metric key, class, space).

    Raises:
        ValueError: unknown detector or space.
    """
    name, _, space = entry.partition("@")
    kind = DETECTORS.pick(setting, name)
    if space not in ("", "features", "projections"):
        raise ValueError(f"{setting}: {entry!r}: expected @features or @projections")
    return entry.replace("@", "_"), kind, space or SPACES.get(name, "features")
