"""WebDataset tars that others made, on disk or behind URLs."""
