"""All measures, which of them a run asks for, and their numbers.

To add one, write a :class:`~gradmix.eval.protocols.measure.Measure` and put it into ``MEASURES``. Another package
declares its own as an entry point of the group ``gradmix.measures``, and ``gradmix-eval measures=[NAME]`` asks for it.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

from gradmix.eval.config import EvalConfig
from gradmix.eval.protocols.closed_set import KNN, FewLabels, KNNOnPixels, Linear, Majority, Quality, TrainedProbe
from gradmix.eval.protocols.measure import NEEDS, Measure, Skipped
from gradmix.eval.protocols.open_set import AtTheStart, OpenSet
from gradmix.eval.protocols.subject import Subject
from gradmix.registry import Registry
from gradmix.ssl.config import Config
from gradmix.ssl.data.open_set import OpenSetData

One = TypeVar("One", bound=Measure)

# In the order that metrics.json has them.
MEASURES: Registry[type[Measure]] = Registry(
    "gradmix.measures",
    {
        "knn": KNN,
        "linear": Linear,
        "trained_probe": TrainedProbe,
        "few_labels": FewLabels,
        "knn_pixels": KNNOnPixels,
        "majority": Majority,
        "quality": Quality,
        "open_set": OpenSet,
        "start": AtTheStart,
    },
)


def choose_measures(config: Config, asked: EvalConfig | None = None, data: OpenSetData | None = None) -> list[Measure]:
    """All of our own measures, and those of other packages that ``measures`` names.

    Args:
        data: the images, once they are there: settings that they don't allow are then errors too.

    Raises:
        ValueError: unknown measures or detectors, or settings that make no sense.
    """
    asked = EvalConfig() if asked is None else asked
    kinds = [MEASURES.pick("measures", name) for name in dict.fromkeys([*MEASURES.own, *asked.measures])]
    measures = [measure for kind in kinds for measure in kind.asked_for(config, asked)]
    for measure in measures:
        if wrong := set(measure.needs) - set(NEEDS):
            raise ValueError(f"measures: {measure.name} needs {wrong.pop()!r}; expected some of {', '.join(NEEDS)}")
        if data is not None:
            measure.check(config, asked, data)
    return measures


def can_be_measured(measures: Sequence[One], subject: Subject) -> tuple[list[One], dict[str, str]]:
    """The measures that lack nothing; and the names of the others with the reason, once for all that lack the same."""
    measures, skipped = list(measures), dict[str, str]()
    for need in NEEDS:
        stopped = [m for m in measures if need in m.needs]
        why = subject.lacks(need) if stopped else None  # to know may take a network
        if why is None:
            continue
        measures = [m for m in measures if m not in stopped]
        kinds = ", ".join(dict.fromkeys(m.KIND for m in stopped))
        named = {
            "projections": [m.name for m in stopped],
            "images": [m.name for m in stopped],
            "pixels": ["raw pixels"],
            "start": ["the network at the start"],
        }
        names = named.get(need, [kinds])
        skipped |= dict.fromkeys(names, why)
    return measures, skipped


def measure_all(measures: list[Measure], subject: Subject) -> tuple[dict[str, Any], dict[str, str]]:
    """Every number by its name; and what could not be measured, with the reason."""
    measures, skipped = can_be_measured(measures, subject)
    result: dict[str, Any] = {}
    for measure in measures:
        for name, value in measure.measure(subject):
            if isinstance(value, Skipped):
                skipped[name] = value.why
            else:
                result[name] = value
    return result, skipped
