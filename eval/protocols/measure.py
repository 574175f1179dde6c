"""What every measure is: it says what it needs, and yields names and values."""

from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

from gradmix.eval.config import EvalConfig
from gradmix.eval.protocols.subject import Subject
from gradmix.ssl.config import Config
from gradmix.ssl.data.open_set import OpenSetData

# classes: of the images, with test images among the known ones. All have features.
NEEDS = ("features", "projections", "classes", "images", "pixels", "start", "unknown images")


class Skipped(NamedTuple):
    """Instead of a value: why there is none."""

    why: str


class Measure:
    """One thing to measure.

    A measure implements ``measure``, which is called once all its ``needs`` are met.
    """

    KIND: ClassVar[str]  # what the list of things that were not measured calls it
    needs: tuple[str, ...] = ("features",)  # some of NEEDS

    @classmethod
    def asked_for(cls, config: Config, asked: EvalConfig) -> "list[Measure]":
        """The measures of this class that a run's config and gradmix-eval's ask for.

        Raises:
            ValueError: settings that make no sense.
        """
        return [cls()]

    def check(self, config: Config, asked: EvalConfig, data: OpenSetData) -> None:
        """
        Raises:
            ValueError: settings that these images don't allow; said before anything is computed.
        """

    def measure(self, subject: Subject) -> Iterator[tuple[str, Any]]:
        """Names of ``metrics.json`` with numbers or texts, or with :class:`Skipped`."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """``KIND``, or longer where there are several of a kind."""
        return self.KIND


def check_neighbours(key: str, k: int, data: OpenSetData) -> None:
    """
    Raises:
        ValueError: a number of neighbours that the training set does not have.
    """
    if not 1 <= k <= len(data.train):
        raise ValueError(f"{key}: expected 1 to {len(data.train)}, the size of the training set, got {k}")
