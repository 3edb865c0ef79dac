"""On a real SLURM, whatever befalls a run, it ends as if nothing had happened, and nobody lends a hand."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.cluster.conftest import Slurm
from tests.cluster.stories import STORIES, Runs

SIDE_BY_SIDE = 3
"""Stories at a time: four processes each, that need a core while they start."""

pytestmark = [pytest.mark.slurm, pytest.mark.multiprocess]


@pytest.fixture(scope="module")
def told(
    request: pytest.FixtureRequest, slurm: Slurm, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[None]]]:
    """The stories that were asked for, running side by side."""
    asked = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    names = [spec.params["story"] for spec in asked if spec is not None]
    runs = Runs(tmp_path_factory.mktemp("events"), slurm)
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        yield {name: pool.submit(STORIES[name], runs) for name in names}
        slurm.given_up.set()
        pool.shutdown(cancel_futures=True)
        slurm.given_up.clear()


@pytest.mark.parametrize("story", STORIES)
def test_the_run_ends_as_the_undisturbed_one(story: str, told: dict[str, Future[None]]) -> None:
    told[story].result()
