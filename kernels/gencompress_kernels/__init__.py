"""Kernels of gencompress: one folder an op, one file a backend."""
