"""Starting a kernel before those before it have ended, which hides the time that a start takes.

The stream's order stays: a kernel that is started early waits for the results of all before it. This is CUDA's
programmatic dependent launch.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl


@triton.jit
def wait_for_others(OVERLAPS: tl.constexpr):
    """Let the next kernel get started, and wait for the results of those before; comes before all loads and stores."""
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@lru_cache
def can_overlap(device: torch.device) -> bool:
    """Whether a device can start a kernel before those before it have ended: GPUs of NVIDIA from Hopper on."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
