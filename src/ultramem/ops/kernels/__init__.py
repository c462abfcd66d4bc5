"""What the operations' Triton kernels share.

Retrieval, in the order of its steps: `axis_scores`, `candidates` (the best keys of each axis), `cells` (the best of
their grid), `gradients`; `selection` finds the best of many numbers and lists them. Any kernel: `launching`,
`operators` (of torch).
"""
