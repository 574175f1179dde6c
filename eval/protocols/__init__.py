"""What is measured on a run, and how: evaluation, probes, corruptions, measures during training."""
