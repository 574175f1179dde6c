"""A saved detector on new images: the scorer, its CSV file, sheets of neighbours."""
