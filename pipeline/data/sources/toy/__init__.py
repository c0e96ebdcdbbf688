"""Toy CelebA: drawn faces whose 40 attributes are visible, in the official folder layout."""
