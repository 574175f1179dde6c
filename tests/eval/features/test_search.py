import numpy as np
import pytest
import torch

from gradmix.eval.features import arrays, search
from gradmix.eval.features.arrays import check_features, check_k, check_labels, unit_rows
from gradmix.eval.features.search import Neighbours


def features(n, width=16, seed=0):
    return np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32)


def slow_nearest(queries, bank, k):
    """One query, one bank row at a time, in Python floats."""
    values, rows = [], []
    for query in queries.astype(np.float64):
        value = [query @ row / np.sqrt((query @ query) * (row @ row)) for row in bank.astype(np.float64)]
        order = sorted(range(len(bank)), key=lambda row: -value[row])[:k]
        values.append([value[row] for row in order])
        rows.append(order)
    return np.array(values), np.array(rows)


@pytest.mark.parametrize("block", [arrays.BLOCK, 16 * 4])
def test_nearest_equals_a_slow_loop(block, monkeypatch):
    monkeypatch.setattr(arrays, "BLOCK", block)
    queries, bank = features(30), features(120, seed=1)
    values, rows = Neighbours(bank, "Flat").search(queries, 7)
    expected_values, expected_rows = slow_nearest(queries, bank, 7)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(values, expected_values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.uint8])
def test_any_number_type(dtype):
    values = torch.arange(12).reshape(4, 3).to(dtype)
    np.testing.assert_array_equal(check_features("features", values), np.arange(12).reshape(4, 3))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros(3), r"features: expected \[N, F\], got shape \(3,\)"),
        (np.zeros((2, 3, 4)), r"features: expected \[N, F\], got shape \(2, 3, 4\)"),
        (np.zeros((0, 3)), r"features: empty, shape \(0, 3\)"),
        (np.zeros((3, 0)), r"features: empty, shape \(3, 0\)"),
        (np.array([["a"]]), r"features: expected numbers, got <U1"),
        (np.full((1, 1), 1e300), r"features: 1 non-finite value, first in row 0"),
    ],
)
def test_bad_features(bad, message):
    with pytest.raises(ValueError, match=message):
        check_features("features", bad)


def test_non_finite_values_are_counted_over_blocks(monkeypatch):
    monkeypatch.setattr(arrays, "BLOCK", 8)
    bad = np.zeros((9, 4), np.float32)
    bad[5, 1], bad[8, 3] = np.nan, np.inf
    with pytest.raises(ValueError, match="bank: 2 non-finite values, first in row 5"):
        check_features("bank", bad)


def test_wrong_width():
    with pytest.raises(ValueError, match=r"queries: expected \[N, 4\], got shape \(2, 3\)"):
        check_features("queries", np.zeros((2, 3)), width=4)


def test_bad_k():
    with pytest.raises(ValueError, match="k=7 is larger than the number of reference features, 5"):
        Neighbours(np.ones((5, 3)), "Flat").search(np.ones((2, 3)), 7)
    with pytest.raises(ValueError, match="k=0 is smaller than 1"):
        check_k(0, 5)


def test_bad_labels():
    with pytest.raises(ValueError, match=r"labels: expected one for each of 3 features, got shape \(2,\)"):
        check_labels("labels", [0, 1], 3)
    with pytest.raises(ValueError, match="labels: expected integers, got float64"):
        check_labels("labels", np.zeros(3), 3)
    assert check_labels("labels", torch.tensor([4, 0], dtype=torch.uint8), 2).tolist() == [4, 0]


def test_unit_rows_at_the_ends_of_float32():
    rows = np.array([[3, 4], [0, 0], [3e-30, 4e-30], [3e30, 4e30]], np.float32)
    np.testing.assert_allclose(unit_rows(rows), [[0.6, 0.8], [0, 0], [0.6, 0.8], [0.6, 0.8]], rtol=1e-6)


def test_search_finds_duplicates_and_zero_rows():
    bank = np.array([[1, 0], [0, 0], [2, 0]], np.float32)
    values, rows = Neighbours(bank, "Flat").search(np.array([[5, 0], [0, 0]], np.float32), 3)
    assert values[0].tolist() == [1, 1, 0] and set(rows[0, :2]) == {0, 2}
    assert values[1].tolist() == [0, 0, 0]


def test_memory_mapped_bank_stays_on_disk(tmp_path, monkeypatch):
    bank = features(100, seed=1)
    bank.tofile(tmp_path / "bank")
    mapped = np.memmap(tmp_path / "bank", np.float32, "r", shape=bank.shape)
    assert isinstance(check_features("bank", mapped), np.memmap)
    monkeypatch.setattr(arrays, "BLOCK", 16 * 8)
    neighbours = Neighbours(mapped, "Flat")
    assert neighbours.features is mapped
    values, rows = neighbours.search(features(20), 9)
    expected_values, expected_rows = slow_nearest(features(20), bank, 9)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(values, expected_values, atol=1e-6)


def test_weights_scale_rows():
    bank, weight = features(50, seed=1), np.linspace(0.1, 5, 50)
    values, rows = Neighbours(bank, "Flat", weight=weight).search(features(10), 3)
    unit = bank / np.linalg.norm(bank, axis=1, keepdims=True) * weight[:, None]
    queries = features(10) / np.linalg.norm(features(10), axis=1, keepdims=True)
    expected = np.sort(queries @ unit.T, axis=1)[:, :-4:-1]
    np.testing.assert_allclose(values, expected, atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(queries @ unit.T, rows, axis=1), expected, atol=1e-5)


def clusters(n, seed=0, width=32, count=40):
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(count, width))
    return (centres[generator.integers(count, size=n)] + 0.5 * generator.normal(size=(n, width))).astype(np.float32)


def distance(values):
    return np.sqrt(np.maximum(2 - 2 * values.astype(np.float64), 0))


@pytest.mark.parametrize("factory", ["IVF32,Flat", "IVF32,SQ8", "RR32,IVF32,Flat", "HNSW32"])
def test_approximate_indexes_are_within_a_hundredth(factory):
    """Also for queries from other clusters, as images of unknown classes are."""
    bank = clusters(4000)
    exact, approximate = Neighbours(bank, "Flat"), Neighbours(bank, factory)
    assert exact.index is None and approximate.index is not None
    for queries in (clusters(200, seed=1), features(200, width=32, seed=2)):
        expected, _ = exact.search(queries, 10)
        values, rows = approximate.search(queries, 10)
        cosine = (unit_rows(queries)[:, None] * exact[rows.ravel()].reshape(*rows.shape, -1)).sum(axis=2)
        np.testing.assert_allclose(cosine, values, atol=0.02 if factory == "IVF32,SQ8" else 1e-5)
        assert 1 <= (distance(cosine.min(axis=1)) / distance(expected[:, -1])).mean() + 1e-6 < 1.01


def test_an_inverted_file_misses_no_more_than_it_may_where_all_rows_are_close():
    """There a cosine that is missed by little is a distance that is missed by much."""
    generator = np.random.default_rng(0)
    bank = (np.ones(8) + 0.03 * generator.normal(size=(8000, 8))).astype(np.float32)
    pairs = generator.integers(8000, size=(2, 500))
    halfway = unit_rows(unit_rows(bank[pairs[0]]) + unit_rows(bank[pairs[1]]))
    tenth = [distance(Neighbours(bank, how).search(halfway, 10)[0][:, -1]) for how in ("Flat", "IVF128,Flat")]
    assert (tenth[1] / tenth[0] - 1).mean() < 3e-4


def test_an_inverted_file_probes_some_lists_but_not_all():
    index = Neighbours(clusters(4000), "IVF64,Flat").index
    assert 1 < index.nprobe < 64


@pytest.mark.parametrize("weight", [None, np.linspace(0.5, 2, 4000)])
def test_an_inverted_file_is_the_same_every_time(weight):
    first, second, other = (Neighbours(clusters(4000), "IVF32,Flat", weight, seed) for seed in (0, 0, 1))
    queries = clusters(100, seed=1)
    for ours, theirs in zip(first.search(queries, 10), second.search(queries, 10), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    centroids = [neighbours.index.quantizer.reconstruct_n(0, 32) for neighbours in (first, second, other)]
    np.testing.assert_array_equal(centroids[0], centroids[1])
    assert (centroids[0] != centroids[2]).any()


def test_lists_with_fewer_than_k_rows_are_searched_exactly():
    bank = features(200)
    approximate = Neighbours(bank, "IVF4,Flat")
    approximate.index.nprobe = 1
    values, rows = approximate.search(features(20, seed=1), 190)  # no list holds so many
    expected, expected_rows = Neighbours(bank, "Flat").search(features(20, seed=1), 190)
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(rows, expected_rows)


def test_auto_is_exact_up_to_a_size(monkeypatch):
    monkeypatch.setattr(search, "EXACT_UP_TO", 4000)
    assert Neighbours(clusters(4000), "auto").factory == "Flat"
    assert Neighbours(clusters(4001), "auto").factory == "IVF256,Flat"


def test_a_wrong_factory_string():
    with pytest.raises(ValueError, match="index: 'IFV32' is no FAISS factory string"):
        Neighbours(features(50), "IFV32")
    with pytest.raises(ValueError, match="index: 'IVF64,Flat' needs more than 50 reference features"):
        Neighbours(features(50), "IVF64,Flat")
