"""Triton kernels of the closed forms in `hookdistill.fused`, for CUDA devices. Nothing else imports Triton, and this only on
first use.

``device/`` holds what runs on the device; the modules here lay out tensors and launch it. `rows` is where row-wise losses come
in.
"""
