"""Newer functions on images, which nothing here calls."""
