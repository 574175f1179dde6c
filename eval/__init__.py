"""What the features are worth: kNN, linear probe, open-set detectors and their metrics."""
