"""Checks of all nodes of a job together: clocks, and the bandwidth of an all-reduce over every device.

The nodes meet at a store that the first one holds, and decide alike. Where the whole group is too slow or fails,
neighbours are tried in pairs: a node whose every pair is bad is to blame.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import time
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from lmp.scaling import preflight_devices as devices
from lmp.scaling.preflight import Finding, Floors, node_name, report

_HELLO_SECONDS = 60.0
_ROUND_SECONDS = 150.0
_BYE_SECONDS = 20.0
_ECHOES = 5


def look(nodes: Sequence[str], *, node: int, ranks: int, address: str, port: int, floors: Floors) -> None:
    """Check as node number `node` of `nodes`; the first prints who is to blame, the others that they took part."""
    try:
        limit = datetime.timedelta(seconds=_HELLO_SECONDS)
        store = dist.TCPStore(address, port, is_master=node == 0, wait_for_workers=False, timeout=limit)
    except RuntimeError as error:
        # The first node names the one that it cannot see; if it is dead itself, it says nothing and is named for that.
        report(Finding("network", False, f"the first node does not answer: {str(error).splitlines()[0]}"))
        print(f"PREFLIGHT {'bad' if node == 0 else 'ok'} {node_name()} network: no store", flush=True)
        return
    meeting = Meeting(store, nodes, node, ranks, address, port, floors)
    blamed = meeting.blamed()
    meeting.leave()
    if node == 0:
        for name, reason in blamed.items():
            print(f"PREFLIGHT bad {name} network: {reason}", flush=True)
    # Only the first node judges: another one, cut off from it, cannot tell whose fault that is.
    if node != 0 or node_name() not in blamed:
        print(f"PREFLIGHT ok {node_name()}", flush=True)


class Meeting:
    """The nodes of a job around one store."""

    def __init__(
        self, store: dist.Store, nodes: Sequence[str], node: int, ranks: int, address: str, port: int, floors: Floors
    ) -> None:
        self.store, self.nodes, self.node, self.ranks = store, nodes, node, ranks
        self.address, self.port, self.floors = address, port, floors

    def blamed(self) -> dict[str, str]:
        """Names of bad nodes, each with the reason; the same on every node."""
        (local,) = devices.in_children(devices._gpus, [()])
        gpus = 0 if isinstance(local, devices.ChildError) else len(local)
        hello = self._gather("hello", {"members": gpus or self.ranks, "gpu": bool(gpus)}, _HELLO_SECONDS)
        silent = {self.nodes[i]: "did not come to the meeting" for i, said in enumerate(hello) if said is None}
        if silent:
            return silent
        self.members = [said["members"] for said in hello]
        self.floor = self.floors.network_gbs if hello[0]["gpu"] else self.floors.cpu_network_gbs
        skews = self._gather("clock", self._skew(), _HELLO_SECONDS)
        if self.node == 0:
            worst = max((abs(skew), self.nodes[i]) for i, skew in enumerate(skews) if skew is not None)
            facts = (
                f"at most {worst[0]:.3f} s from the first node's ({worst[1]}), allowed {self.floors.clock_seconds:g}"
            )
            report(Finding("clock", worst[0] <= self.floors.clock_seconds, facts))
        wrong = wrong_clocks(self.nodes, skews, self.floors.clock_seconds)
        if wrong:
            return wrong
        whole = self._round("all", [list(range(len(self.nodes)))])
        if all(finding["fit"] for finding in whole):
            return {}
        pairs: dict[tuple[int, int], bool] = {}
        for name, groups in pair_rounds(len(self.nodes)):
            results = self._round(name, groups)
            pairs |= {(a, b): results[a]["fit"] and results[b]["fit"] for a, b in groups}
        guilty = guilty_nodes(len(self.nodes), pairs)
        if not guilty and self.node == 0:
            print(f"{node_name()} ok  network: slow together, good in every pair; no node is to blame", flush=True)
        return {self.nodes[i]: f"all-reduce with each neighbour fails; {whole[i]['facts']}" for i in guilty}

    def _round(self, name: str, groups: list[list[int]]) -> list[dict[str, Any]]:
        """All-reduce within each group of nodes at the same time; the finding of every node, known to all."""
        own = {"fit": True, "facts": "not in this round"}
        for group in groups:
            if self.node in group:
                before = sum(self.members[i] for i in group[: group.index(self.node)])
                world = sum(self.members[i] for i in group)
                meet = f"{name}/{group[0]}"
                calls = [
                    (self.address, self.port, meet, before + local, world, local)
                    for local in range(self.members[self.node])
                ]
                results = devices.in_children(devices.all_reduce, calls)
                finding = devices.bandwidth_finding(f"network {name}", results, world, self.floor)
                if self.node == group[0] or not finding.fit:
                    report(finding)
                own = {"fit": finding.fit, "facts": finding.facts}
        silent = {"fit": False, "facts": "died in the all-reduce"}
        return [said or silent for said in self._gather(f"round/{name}", own, _ROUND_SECONDS)]

    def _gather(self, name: str, own: Any, seconds: float) -> list[Any]:
        """What every node says, None for those that the first node did not hear within the time."""
        self._say(f"{name}/{self.node}", own)
        if self.node == 0:
            deadline = time.monotonic() + seconds
            self._say(f"{name}/all", [self._hear(f"{name}/{i}", deadline) for i in range(len(self.nodes))])
        heard = self._hear(f"{name}/all", time.monotonic() + seconds + 10)
        return heard if heard is not None else [None] * len(self.nodes)

    def leave(self) -> None:
        """The first node holds the store and goes last."""
        self._say(f"bye/{self.node}", True)
        if self.node == 0:
            deadline = time.monotonic() + _BYE_SECONDS
            for i in range(len(self.nodes)):
                self._hear(f"bye/{i}", deadline)

    def _say(self, key: str, value: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the first node is gone: nobody hears
            self.store.set(key, json.dumps(value))

    def _hear(self, key: str, deadline: float) -> Any:
        try:
            self.store.wait([key], datetime.timedelta(seconds=max(0.1, deadline - time.monotonic())))
            return json.loads(self.store.get(key))
        except RuntimeError:
            return None

    def _skew(self) -> float:
        """Seconds by which this node's clock is before the first node's: the echo with the shortest way tells."""
        found = []
        deadline = time.monotonic() + _HELLO_SECONDS
        if self.node == 0:
            for turn in range(_ECHOES):
                for i in range(1, len(self.nodes)):
                    if self._hear(f"ask/{i}/{turn}", deadline) is not None:
                        self._say(f"answer/{i}/{turn}", time.time())
            return 0.0
        for turn in range(_ECHOES):
            began = time.time()
            self._say(f"ask/{self.node}/{turn}", True)
            theirs = self._hear(f"answer/{self.node}/{turn}", deadline)
            ended = time.time()
            if theirs is not None:
                found.append((ended - began, (began + ended) / 2 - theirs))
        return min(found)[1] if found else 0.0


def wrong_clocks(nodes: Sequence[str], skews: Sequence[float | None], allowed: float) -> dict[str, str]:
    """Nodes whose clock is off. Where most nodes are off the first one's clock in the same way, the first one is.

    Args:
        nodes: names.
        skews: seconds by which each is before the first; None of one that fell silent.
        allowed: seconds.
    """
    known = sorted(skew for skew in skews if skew is not None)
    middle = known[len(known) // 2] if len(known) > 2 else 0.0
    return {
        name: "fell silent" if skew is None else f"its clock is {skew - middle:+.1f} s from the others'"
        for name, skew in zip(nodes, skews, strict=True)
        if skew is None or abs(skew - middle) > allowed
    }


def pair_rounds(nodes: int) -> list[tuple[str, list[list[int]]]]:
    """Rounds of disjoint pairs of neighbours in a ring, so that each node of three or more meets two others."""
    if nodes == 2:
        return [("pairs", [[0, 1]])]
    even = [[i, i + 1] for i in range(0, nodes - 1, 2)]
    odd = [[i, i + 1] for i in range(1, nodes - 1, 2)]
    last = [[0, nodes - 1]]
    if nodes % 2 == 0:
        return [("pairs", even), ("other pairs", odd + last)]
    return [("pairs", even), ("other pairs", odd), ("last pair", last)]


def guilty_nodes(nodes: int, pairs: dict[tuple[int, int], bool]) -> list[int]:
    """The nodes whose every pair failed. Of two nodes alone it cannot be told which is bad: both are named."""
    own = {i: [fit for pair, fit in pairs.items() if i in pair] for i in range(nodes)}
    return [i for i in range(nodes) if own[i] and not any(own[i])]
