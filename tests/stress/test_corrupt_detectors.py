"""A thousand random truncations and bit flips of every kind of saved detector: refused, or equal scores."""

import numpy as np
import pytest

from gradmix.eval.detectors import DETECTORS, load

CASES = [*((kind, {}) for kind in DETECTORS.values()), (DETECTORS["deep_knn"], {"index": "IVF4,Flat"})]


@pytest.mark.parametrize(("kind", "parameters"), CASES)
def test_damage_is_never_silent(kind, parameters, damage, tmp_path):
    generator = np.random.default_rng(0)
    train, labels = generator.normal(size=(200, 16)), generator.integers(4, size=200)
    queries = generator.normal(size=(10, 16))
    saved, damaged = tmp_path / "saved", tmp_path / "damaged"
    kind(**parameters).fit(train, labels).calibrate(queries).save(saved)
    expected = load(saved).assess(queries)
    refused = 0
    for _ in range(1000):
        damage(saved, damaged, generator)
        try:
            loaded = load(damaged)
        except ValueError as error:
            assert str(damaged) in str(error)
            refused += 1
        else:
            for ours, theirs in zip(loaded.assess(queries), expected, strict=True):
                np.testing.assert_array_equal(ours, theirs)
    assert refused > 950
