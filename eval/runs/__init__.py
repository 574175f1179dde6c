"""Whole runs: reading one, groups of many, paired comparison, checkpoints from elsewhere, export."""
