"""Nearest neighbours. The one place that searches with FAISS.

On the CPU in float32, because that is what the FAISS of the package index offers. Queries, and a bank that is
memory-mapped, are read in blocks (`gradmix.eval.features.arrays`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, cast

import faiss
import numpy as np

from gradmix.eval.features.arrays import blocks, check_k, unit_rows
from gradmix.ssl.keys import Key

# past it an inverted file answers faster (1.4 x at 200,000, 4 x at 500,000); from about 500,000 on, 10,000 images repay
# its building: benchmarks/detectors.py
EXACT_UP_TO = 200_000  # rows that index="auto" still searches exactly
DISTANCE_ERROR = 1e-4  # mean relative excess of the 10th distance that an index may have
TRAINED_ON = 2**16  # rows that an index is trained on, or 40 per inverted list if that is more


def inner_product(queries: np.ndarray, bank: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest inner products `[N, k]`, descending, and their rows of the bank, of float32 arrays."""
    return faiss.knn(queries, bank, k, faiss.METRIC_INNER_PRODUCT)


def inverted_file(count: int) -> str:
    """The factory string that "auto" takes for `count` rows past `EXACT_UP_TO`: about 4 sqrt(count) lists."""
    return f"IVF{2 ** round(np.log2(4 * count**0.5))},Flat"


# Of the indexes that a factory string can ask for, those that come back from a file.
SAVED = re.compile(r"(?P<flat>IVF\d{1,7},Flat)|(RR\d{1,5},)?IVF\d{1,7},(Flat|SQ8)|HNSW\d{1,3}")
SAVED_KINDS = "IVF<lists>,Flat, IVF<lists>,SQ8, RR<width>,IVF<lists>,Flat and HNSW<links>"


@dataclass
class SavedIndex:
    """How an index was made, and its effort: nprobe of an inverted file, efSearch of HNSW."""

    factory: str
    effort: Annotated[int, Key(at_least=1, at_most=2**24)]


def _inverted_file(bank: np.ndarray, centres: np.ndarray, lists: np.ndarray) -> faiss.IndexIVFFlat:
    """The index that holds row r of the bank in list `lists[r]`."""
    width = bank.shape[1]
    quantizer = faiss.IndexFlatIP(width)
    quantizer.add(np.ascontiguousarray(centres))
    index = faiss.IndexIVFFlat(quantizer, width, len(centres), faiss.METRIC_INNER_PRODUCT)
    for rows in blocks(bank.shape):
        block, numbers = np.ascontiguousarray(bank[rows]), np.ascontiguousarray(lists[rows])
        index.add_core(len(block), faiss.swig_ptr(block), None, faiss.swig_ptr(numbers))
    return index


class Neighbours:
    """A bank of unit-length rows and the search for those with the largest inner product.

    Args:
        features: `[M, F]`, checked. Normalised once into a float32 copy; a memory-mapped array is left on
            disk and normalised block by block, on every search.
        index: a FAISS factory string ("Flat" is exact), or "auto": exact up to `EXACT_UP_TO` rows, an
            `inverted_file` past it. The effort of an inverted file (nprobe) or of HNSW (efSearch) is chosen
            so that the 10th distance of points halfway between rows of the bank is within `DISTANCE_ERROR` of
            the exact one on average. Any index but "Flat" keeps a copy of the rows (or their codes) in
            memory. Exact search and inverted files give the same result every time; HNSW depends on the
            threads.
        weight: `[M]`, multiplies the rows after they are normalised.
        seed: of the k-means behind an inverted file.
    """

    def __init__(
        self, features: np.ndarray, index: str = "auto", weight: np.ndarray | None = None, seed: int = 0
    ) -> None:
        self.features, self.weight, self.prepared = features, weight, False
        if not isinstance(features, np.memmap):
            self.features = self[:]
            self.prepared = True
        if index == "auto":
            index = "Flat" if len(features) <= EXACT_UP_TO else inverted_file(len(features))
        self.factory = index
        self.index = None if index == "Flat" else self._build(index, seed)

    def saved(self) -> tuple["SavedIndex | None", dict[str, np.ndarray]]:
        """What :meth:`restore` takes beside the rows: nothing for "Flat"; of an inverted file the centre of every list
        `[L, F]` and the list of every row `[M]`; of other indexes only how they are made.

        Raises:
            ValueError: an index of a kind that is not saved.
        """
        if self.index is None:
            return None, {}
        if not SAVED.fullmatch(self.factory):
            raise ValueError(f"index: {self.factory!r} is not saved with a detector; {SAVED_KINDS} are")
        inverted = faiss.try_extract_index_ivf(self.index)
        if inverted is None:
            return SavedIndex(self.factory, cast(faiss.IndexHNSW, self.index).hnsw.efSearch), {}
        about = SavedIndex(self.factory, inverted.nprobe)
        if type(self.index) is not faiss.IndexIVFFlat:
            return about, {}
        lists = np.empty(len(self), np.int64)
        for number in range(inverted.nlist):
            inside = cast(faiss.InvertedLists, inverted.invlists)
            lists[faiss.rev_swig_ptr(inside.get_ids(number), inside.list_size(number))] = number
        return about, {"centres_": inverted.quantizer.reconstruct_n(0, inverted.nlist), "lists_": lists}

    @classmethod
    def restore(cls, bank: np.ndarray, about: "SavedIndex | None", arrays: Mapping[str, np.ndarray]) -> "Neighbours":
        """A bank whose rows are prepared already (what `[:]` gave), and what :meth:`saved` gave.

        FAISS reads no file: an inverted file is put together from its arrays (200,000 rows of 512 in 0.7 s),
        other indexes are built anew.

        Raises:
            ValueError: an index that is not of these rows, or of a kind that is not saved.
        """
        neighbours = cls.__new__(cls)
        neighbours.features, neighbours.weight, neighbours.prepared = bank, None, True
        neighbours.factory, neighbours.index = "Flat", None
        if about is None:
            return neighbours
        kind = SAVED.fullmatch(about.factory)
        if kind is None:
            raise ValueError(f"index.factory: {about.factory[:80]!a} is not read from a file; {SAVED_KINDS} are")
        if max(map(int, re.findall(r"\d+", about.factory))) > max(512, len(bank)):
            raise ValueError(f"index.factory: {about.factory!a} is too large for {len(bank)} rows")
        neighbours.factory = about.factory
        if kind["flat"]:
            neighbours.index = _inverted_file(bank, arrays["centres_"], arrays["lists_"])
        else:
            neighbours.index = neighbours._build(about.factory, seed=0)
        inverted = faiss.try_extract_index_ivf(neighbours.index)
        if inverted is not None:
            inverted.nprobe = about.effort
        else:
            cast(faiss.IndexHNSW, neighbours.index).hnsw.efSearch = about.effort
        return neighbours

    @property
    def shape(self) -> tuple[int, ...]:
        """``(M, F)``."""
        return self.features.shape

    @property
    def dtype(self) -> np.dtype:
        """Of the prepared rows."""
        return np.dtype(np.float32)

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """Prepared rows, float32, by slice or by row numbers."""
        if self.prepared:
            return self.features[rows]
        unit = unit_rows(self.features[rows])
        return unit if self.weight is None else unit * self.weight[rows, None].astype(np.float32)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The largest inner products of unit-length queries `[N, F]` with the bank.

        Returns:
            Inner products `[N, k]` float32, descending, and row numbers `[N, k]` int64.
        """
        check_k(k, len(self))
        parts = [self._search(unit_rows(queries[rows]), k) for rows in blocks(queries.shape)]
        values, numbers = (np.concatenate(part) for part in zip(*parts, strict=True))
        return values, numbers

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if self.index is None:
            return self._exact(queries, k)
        values, rows = self.index.search(queries, k)
        short = (rows < 0).any(axis=1)  # the probed lists held fewer than k rows
        if short.any():
            values[short], rows[short] = self._exact(queries[short], k)
        return values, rows

    def _exact(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if not isinstance(self.features, np.memmap):
            return inner_product(queries, self.features, k)
        heap = faiss.ResultHeap(len(queries), k, keep_max=True)
        for rows in blocks(self.shape):
            block = self[rows]
            values, numbers = inner_product(queries, block, min(k, len(block)))
            heap.add_result(values, numbers + rows.start)
        heap.finalize()
        return heap.D, heap.I

    def _build(self, factory: str, seed: int) -> faiss.Index:
        try:
            index = faiss.index_factory(self.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise ValueError(f"index: {factory!r} is no FAISS factory string") from error
        inverted = faiss.try_extract_index_ivf(index)
        generator = np.random.default_rng(seed)
        order = generator.permutation(len(self))
        if not index.is_trained:
            if inverted is not None:
                inverted.cp.seed = seed
            wanted = TRAINED_ON if inverted is None else max(TRAINED_ON, 40 * inverted.nlist)
            try:
                index.train(self[np.sort(order[:wanted])])
            except RuntimeError as error:
                raise ValueError(f"index: {factory!r} needs more than {len(self)} reference features") from error
        for rows in blocks(self.shape):
            index.add(np.ascontiguousarray(self[rows]))
        if inverted is not None:
            self._choose_effort(index, inverted, "nprobe", inverted.nlist, order)
        elif isinstance(index, faiss.IndexHNSW):
            self._choose_effort(index, index.hnsw, "efSearch", 4096, order)
        return index

    def _choose_effort(self, index: faiss.Index, part: Any, knob: str, most: int, order: np.ndarray) -> None:
        """Set `part.knob`, at most `most`, within a quarter of the smallest that `DISTANCE_ERROR` allows."""
        # halfway between rows is between clusters, as unknown images are; rows themselves are too easy
        queries = unit_rows(self[order[:256]] + self[order[-256:]])
        k = min(10, len(self))
        exact = self._exact(queries, k)[0][:, -1].astype(np.float64)
        scale = (2 - 2 * exact).sum() if self.weight is None else np.abs(exact).sum()
        effort = 1
        while True:
            setattr(part, knob, effort)
            reached = index.search(queries, k)[0][:, -1].astype(np.float64)
            # d^2 = 2 - 2 cos: the cosine that is missed, over d^2, is the relative excess of the distance d
            if effort == most or (exact - reached).sum() <= DISTANCE_ERROR * scale:
                break
            effort = min(effort + max(1, effort // 4), most)
