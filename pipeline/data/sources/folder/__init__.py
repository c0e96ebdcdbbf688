"""Folders of images beside a file of labels."""
