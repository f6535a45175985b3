"""Composition: upstream's FlashAttention backend on the kernels of this package."""
