"""The benchmarks, one file each; `select` finds them by name."""

from __future__ import annotations

import difflib

from lmp.downstream.tasks import ave, boundaries, condensed_movies, lvu, movieclip, moviecuts, muses, soundtrack
from lmp.downstream.tasks.base import RetrievalTask, Task
from lmp.errors import UserError

AnyTask = Task | RetrievalTask

TASKS: dict[str, AnyTask] = {
    task.name: task
    for module in (lvu, condensed_movies, moviecuts, ave, muses, soundtrack, boundaries, movieclip)
    for task in module.TASKS
}


def select(name: str) -> list[AnyTask]:
    """The task of this name, or all tasks of a benchmark: `lvu` is every `lvu/...`.

    Raises:
        UserError: there is none; names the nearest.
    """
    if name in TASKS:
        return [TASKS[name]]
    found = [task for one, task in TASKS.items() if one.startswith(f"{name}/")]
    if not found:
        near = difflib.get_close_matches(name, [*TASKS, *{one.partition("/")[0] for one in TASKS}])
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(TASKS)}"
        raise UserError(f"there is no task {name}", remedy=hint)
    return found
