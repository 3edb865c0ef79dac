"""The engines in which test_health_gate.py leaves updates out."""

from __future__ import annotations

from tests.train.cases import Kind

KINDS = [*(Kind(stage) for stage in range(4)), *(Kind(stage, "bf16") for stage in (1, 2, 3)), Kind(2, offload=True)]
