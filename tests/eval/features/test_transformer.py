"""Features in scikit-learn's pipelines."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils import estimator_checks

import gradmix


def digits(count):
    data = load_digits()
    return (data.images[:count] * (255 / 16)).round().astype(np.uint8), data.target[:count]


def test_in_a_pipeline(digits_run, tmp_path):
    X, y = digits(300)
    pipeline = make_pipeline(gradmix.Features(digits_run), LogisticRegression(max_iter=2000))
    assert cross_val_score(pipeline, X, y, cv=3).mean() > 0.5  # ten digits
    features = gradmix.Features(digits_run, batch_size=7).fit_transform(X[:20])
    model = gradmix.load(digits_run)
    expected = model(torch.stack([model.transform(Image.fromarray(image)) for image in X[:20]]))
    np.testing.assert_allclose(features, expected.numpy(), rtol=1e-4, atol=1e-5)
    Image.fromarray(X[0]).save(tmp_path / "0.png")
    mixed = gradmix.Features(digits_run).fit(None).transform([tmp_path / "0.png", Image.fromarray(X[1]), X[2]])
    np.testing.assert_allclose(mixed, features[:3], rtol=1e-4, atol=1e-5)


def test_what_scikit_learn_asks_of_an_estimator(digits_run):
    estimator = gradmix.Features(digits_run)
    for check in ("no_attributes_set_in_init", "get_params_invariance", "set_params"):
        getattr(estimator_checks, f"check_{check}")("Features", estimator)
    assert clone(estimator).get_params() == {"run": digits_run, "batch_size": 256, "device": "cpu"}
    X, _ = digits(3)
    with pytest.raises(NotFittedError):
        estimator.transform(X)
    with pytest.raises(ValueError, match="X: expected at least one image"):
        estimator.fit(X).transform([])
    assert list(estimator.get_feature_names_out()[:2]) == ["feature0", "feature1"]
    assert estimator.set_output(transform="default").transform(X).shape == (3, estimator.n_features_out_)
    with pytest.raises(ValueError, match="nowhere"):
        gradmix.Features("nowhere").fit(X)
