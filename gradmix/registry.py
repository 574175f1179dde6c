"""Names that the command line knows: our own, and those that other installed packages declare as entry points."""

import difflib
from collections.abc import Collection, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
MOST_NAMES = 20  # that a message lists


class Registry(Mapping[str, T]):
    """A mapping from name to whatever stands for it; what is outside is imported only when it is asked for.

    Args:
        group: the entry points' group, such as ``"gradmix.mixers"``.
        own: this project's names. They win: no other package can replace them.
    """

    def __init__(self, group: str, own: dict[str, T]):
        self.group, self.own = group, own

    def __getitem__(self, name: str) -> T:
        if name in self.own:
            return self.own[name]
        entry = self._outside()[name]
        try:
            return entry.load()
        except Exception as error:  # anything can go wrong in another package
            where = f"{self.group}: {name} = {entry.value} of the package {entry.dist.name if entry.dist else '?'}"
            raise ValueError(f"{where} can't be loaded ({type(error).__name__}: {error})") from error

    def __contains__(self, name: object) -> bool:
        return name in self.own or name in self._outside()

    def __iter__(self) -> Iterator[str]:
        yield from self.own
        yield from (name for name in sorted(self._outside()) if name not in self.own)

    def __len__(self) -> int:
        return len(list(iter(self)))

    def pick(self, key: str, name: str) -> T:
        """What ``name`` stands for.

        Args:
            key: where the name was given; the message begins with it.

        Raises:
            ValueError: no such name; the message has the nearest one, or all.
        """
        if name not in self:
            raise ValueError(f"{key}: no {name!r}; {nearest(name, self)}")
        return self[name]

    def _outside(self) -> dict[str, EntryPoint]:
        return {entry.name: entry for entry in entry_points(group=self.group)}


def nearest(name: str, names: Collection[str]) -> str:
    """``did you mean ...?``, or what there is, for a message on a name that does not exist."""
    near = difflib.get_close_matches(name, names, 1)
    if near:
        return f"did you mean {near[0]}?"
    more = ", ..." if len(names) > MOST_NAMES else ""
    return f"choose from {', '.join(islice(names, MOST_NAMES)) or 'none'}{more}"
