"""Jobs on a SLURM cluster."""

from __future__ import annotations

from launch.executor import executor, submit, submit_array
from launch.slurm_state import job_state, wait

__all__ = ["executor", "job_state", "submit", "submit_array", "wait"]
