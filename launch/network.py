"""The one place of what lmp sets for torch, NCCL and caches in a job.

Each is a default: a value from the job's environment wins, so a cluster's own settings (network interfaces, plugins)
stand in the shell file that `cluster.environment` names. docs/slurm.md has examples of such files.
"""

from __future__ import annotations

import getpass
import os
import tempfile
from pathlib import Path

DEFAULTS = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",  # a dead peer ends the process instead of blocking it
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",  # which collective each rank was in
    "TORCH_FR_BUFFER_SIZE": "20000",  # how many of them the flight recorder remembers
    "NCCL_DEBUG": "WARN",
    "TQDM_DISABLE": "1",  # one line of log for each refresh
}
"""Settings that are right on any cluster. Tuning variables are left alone: NCCL chooses better than a guess does."""


def set_defaults(*, job: str, restart: int) -> None:
    """Set what the environment does not have yet; before torch is imported.

    Args:
        job: the job's id.
        restart: how often it was restarted.
    """
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))
    # On a shared file system the compilers' caches meet stale handles and each other.
    local = Path(tempfile.gettempdir()) / f"lmp-{getpass.getuser()}-{job}-{restart}"
    os.environ.setdefault("TRITON_CACHE_DIR", str(local / "triton"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(local / "inductor"))
