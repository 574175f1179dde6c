"""A network's features: extraction, cache, blocks of arrays, nearest-neighbour search; and features as files."""
