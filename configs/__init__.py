"""Hydra configs; the schema that they fill is gradmix.ssl.config."""
