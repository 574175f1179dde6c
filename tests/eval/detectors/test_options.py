"""Detectors as a config names them."""

import pytest

from gradmix.eval.detectors.options import build_detector, parse_detector


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deep_kn": {"k": 1}}, "detector_options: no 'deep_kn'; did you mean deep_knn?"),
        ({"deep_knn": {"kk": 1}}, "detector_options.deep_knn.kk: no such parameter; did you mean k?"),
        ({"deep_knn": {"k": "ten"}}, "detector_options.deep_knn.k: expected int, got 'ten'"),
        ({"deep_knn": {"k": True}}, "detector_options.deep_knn.k: expected int, got True"),
        ({"deep_knn": 3}, "detector_options.deep_knn: expected parameters"),
        ({"deep_knn": {"index": "PQ8"}}, "detector_options.deep_knn.index: expected auto, Flat, IVF<lists>,Flat"),
        ({"deep_knn": {"index": "flat"}}, "detector_options.deep_knn.index: expected auto, Flat, IVF<lists>,Flat"),
    ],
)
def test_detector_options_are_checked(options, message):
    with pytest.raises(ValueError) as caught:
        build_detector(next(iter(options)), options)
    assert message in str(caught.value)


def test_detector_options_reach_the_detector():
    assert build_detector("deep_knn", {"deep_knn": {"k": 7}}).k == 7
    for index in ("auto", "Flat", "IVF16,Flat", "RR32,IVF16,SQ8", "HNSW32"):
        assert build_detector("deep_knn", {"deep_knn": {"index": index}}).index == index
    assert build_detector("vim", {"deep_knn": {"k": 7}, "vim": {"dimension": None}}).dimension is None
    assert build_detector("mahalanobis", {"mahalanobis": {"shrinkage": 1}}).shrinkage == 1


def test_detector_entries():
    assert parse_detector("deep_knn")[0::2] == ("deep_knn", "features")
    assert parse_detector("class_knn")[0::2] == ("class_knn", "projections")
    assert parse_detector("class_knn@features")[0::2] == ("class_knn_features", "features")
    with pytest.raises(ValueError, match="expected @features or @projections"):
        parse_detector("deep_knn@pixels")
