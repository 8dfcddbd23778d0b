"""Triton kernels and their launchers, one file an op; they know tensors' memory and nothing of autograd."""
