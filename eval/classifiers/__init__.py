"""Classifiers on features and on images: kNN, linear probe, few labels, fine-tuning."""

from gradmix.eval.classifiers.knn import KNNClassifier
from gradmix.eval.classifiers.linear import LinearProbe

__all__ = ["KNNClassifier", "LinearProbe"]
