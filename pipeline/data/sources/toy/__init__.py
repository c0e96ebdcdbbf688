"""Toy faces: drawn faces whose 40 attributes are visible, in CelebA's official layout."""
