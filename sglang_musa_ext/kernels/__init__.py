"""Providers of FA3 kernels: MATE, NVIDIA's and the PyTorch reference."""
