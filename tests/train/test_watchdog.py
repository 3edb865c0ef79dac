"""Which rank is named from what the ranks say of themselves."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from lmp.parallel.mesh import mesh
from lmp.train.watchdog import RankState, collectives_entered, diagnose, dump

STEP = [
    ("reading", 0, 0),
    ("counting", 0, 1),
    ("forward", 1, 3),
    ("backward", 1, 3),
    ("summing", 0, 1),
    ("agreeing", 0, 1),
]
"""The phases of a step: name, micro-batch, collectives in it."""


def state(rank: int, *, step: int, phase: str, entered: int = 0, skip: tuple[int, str] | None = None) -> RankState:
    """A rank that is in a phase of a step, `entered` collectives into it; in one phase it has left out a collective."""
    trail, count = [], 0
    for number in range(1, step + 1):
        for name, micro_batch, collectives in STEP:
            trail.append((number, micro_batch, name, count))
            if (number, name) == (step, phase):
                break
            count += collectives - (skip == (number, name))
    return RankState(
        rank=rank,
        host=f"node{rank}",
        process=1,
        phase=phase,
        step=step,
        micro_batch=trail[-1][1],
        films=[f"film-{rank}"],
        seconds=9.0,
        collectives=count + entered,
        trail=trail,
    )


def test_the_rank_that_reads_while_others_wait_is_named() -> None:
    states = [state(rank, step=5, phase="counting", entered=1) for rank in range(4)]
    states[2] = state(2, step=5, phase="reading")
    found = diagnose(states, 4)
    assert found.ranks == [2]
    assert "rank 2 on node2: reading, step 5, films film-2" in found.words


def test_the_rank_that_left_out_a_collective_is_named_even_when_it_is_ahead() -> None:
    states = [state(rank, step=5, phase="agreeing", entered=1) for rank in range(4)]
    states[1] = state(1, step=6, phase="counting", entered=1, skip=(5, "agreeing"))
    found = diagnose(states, 4)
    assert found.ranks == [1]
    assert "rank 1 on node1: agreeing, step 5" in found.words
    assert "entered 0 collectives there, the others 1" in found.words


def test_the_first_phase_where_they_differ_counts() -> None:
    states = [state(rank, step=6, phase="summing", entered=1) for rank in range(3)]
    states[0] = state(0, step=6, phase="summing", entered=1, skip=(4, "backward"))
    assert diagnose(states, 3).ranks == [0]
    assert "backward, step 4, micro-batch 1" in diagnose(states, 3).words


def test_of_two_ranks_the_one_with_fewer_is_named() -> None:
    states = [
        state(0, step=5, phase="counting", entered=1),
        state(1, step=5, phase="forward", entered=1, skip=(5, "counting")),
    ]
    found = diagnose(states, 2)
    assert found.ranks == [1]
    assert "counting, step 5" in found.words


def test_a_rank_without_an_answer_is_named_first() -> None:
    states = [state(rank, step=5, phase="counting", entered=1) for rank in (0, 1, 3)]
    found = diagnose(states, 4)
    assert found.ranks == [2]
    assert "did not answer" in found.words


def test_ranks_that_are_all_alike_are_all_named() -> None:
    found = diagnose([state(rank, step=5, phase="backward", entered=2) for rank in range(2)], 2)
    assert found.ranks == [0, 1]
    assert "backward, step 5" in found.words


def test_the_groups_of_torch_count_collectives() -> None:
    assert collectives_entered() == 0
    with mesh(1, timeout_minutes=1):
        group = dist.new_group([0])
        before = collectives_entered()
        dist.all_reduce(torch.ones(1))
        dist.all_gather([torch.ones(1)], torch.ones(1), group=group)
        dist.barrier()
        assert collectives_entered() == before + 3, "this torch numbers collectives otherwise: adapt watchdog.py"


def test_a_dump_holds_the_stacks_and_where_the_rank_was(tmp_path: Path) -> None:
    dump(tmp_path, state(3, step=2, phase="backward"))
    text = (tmp_path / "rank-0003.txt").read_text()
    assert "rank 3 on node3: backward, step 2, micro-batch 1, films film-3" in text
    assert "test_a_dump_holds_the_stacks" in text
    assert (tmp_path / "rank-0003.json").is_file()
