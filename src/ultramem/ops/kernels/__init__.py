"""What the operations' Triton kernels share."""
