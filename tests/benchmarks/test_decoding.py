"""The floor of a mixture of experts in decoding."""

from __future__ import annotations

import pytest
from benchmarks.decoding import touched_bytes

from ultramem.hosts.olmo_core import preset


def test_experts_that_tokens_touch() -> None:
    model = preset("olmoe_227m")
    moe = model.moe
    assert moe is not None
    expert, router = 2 * 3 * model.d_model * moe.hidden_size, 2 * model.d_model * moe.num_experts
    assert touched_bytes(model.d_model, moe, 1) == pytest.approx(moe.top_k * expert + router)
    assert touched_bytes(model.d_model, moe, 1000) == pytest.approx(moe.num_experts * expert + router)
