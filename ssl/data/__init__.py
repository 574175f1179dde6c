"""What a batch is made of: images and their sources, open-set splits, the loader."""
