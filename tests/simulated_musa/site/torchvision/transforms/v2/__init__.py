"""Newer transforms, which nothing here calls."""
