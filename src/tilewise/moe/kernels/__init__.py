"""Triton kernels only; nothing of the library outside this folder is imported here."""
