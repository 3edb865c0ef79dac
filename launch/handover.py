"""What the processes of a job tell its batch script, which alone puts the job back in the queue (slurm/step.sh).

The batch script does it, and not a process: it outlives them all, and it has `scontrol` where they, in a container,
have not.
"""

from __future__ import annotations

import os


def tell(word: str, value: str) -> None:
    """Append a line: `run PATH`, `requeue REASON` or `exit CODE WHY`; nothing without a batch script of ours."""
    path = os.environ.get("LMP_HANDOVER")
    if path:
        with open(path, "a", encoding="utf-8") as file:  # noqa: PTH123
            file.write(f"{word} {' '.join(value.split())}\n")
