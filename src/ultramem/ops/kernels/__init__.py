"""What the operations' Triton kernels share.

Retrieval, in the order of its steps: `axis_scores`, `candidates` (the best keys of each axis), `cells` (the best of
their grid), `gradients`; `threshold` and `compaction` find the best of many numbers and list them. Any kernel:
`launching`, `operators` (of torch), `sizes`.
"""
