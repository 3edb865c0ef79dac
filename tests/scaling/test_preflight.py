"""What the pre-flight takes for a fit node, and whom it blames. tests/cluster runs it on the nodes of a job."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lmp.scaling import preflight, preflight_devices
from lmp.scaling.preflight_network import guilty_nodes, pair_rounds, wrong_clocks
from tests.runs import run

pytestmark = pytest.mark.multiprocess


def look(folder: Path, *arguments: str) -> str:
    done = run("node", "--run", str(folder), *arguments, module="lmp.scaling.preflight")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_healthy_node_passes_every_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    out = look(tmp_path, "--ranks", "2")
    assert "node7 ok  allreduce: " in out and "over 2 ranks" in out
    for check in ("python", "gpus", "compute", "infiniband", "shm", "tmp", "run"):
        assert f"node7 ok  {check}: " in out
    assert out.splitlines()[-1] == "PREFLIGHT ok node7"
    assert not list(tmp_path.iterdir()), "the write test left something behind"


def test_what_is_below_a_floor_is_named_and_the_rest_is_still_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    monkeypatch.setenv("SLURM_GPUS_PER_NODE", "a100:100(S:0)")
    monkeypatch.setenv("LMP_PREFLIGHT_RUN_GIB", "1e9")
    out = look(tmp_path)
    assert "node7 BAD gpus: " in out and "of 100 asked for" in out
    assert "node7 BAD run: " in out and "needs 1e+09" in out
    assert "node7 ok  tmp: " in out
    assert out.splitlines()[-1].startswith("PREFLIGHT bad node7 gpus: ")


def test_a_run_folder_that_cannot_be_written_is_a_fault(tmp_path: Path) -> None:
    found = preflight.check_space("run", tmp_path / "absent", 0)
    assert not found.fit and "No such file" in found.facts


def test_a_floor_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMP_PREFLIGHT_SHM_GIB", "much")
    with pytest.raises(ValueError, match="LMP_PREFLIGHT_SHM_GIB=much"):
        preflight.Floors.read()


def test_infiniband_ports(tmp_path: Path) -> None:
    for device, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN")):
        port = tmp_path / device / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(state + "\n")
    assert preflight.check_infiniband(1, tmp_path).fit
    found = preflight.check_infiniband(2, tmp_path)
    assert not found.fit and "1 of 2 ports active" in found.facts


@pytest.mark.parametrize(
    ("out", "fit"),
    [
        ("0, 0\n1, 0\n", True),
        ("0, [N/A]\n1, [N/A]\n", True),
        ("00000000:07:00.0, No\n00000000:0A:00.0, No\n", True),
        ("0, 0\n1, 3\n", False),
        ("00000000:07:00.0, No\n00000000:0A:00.0, Yes\n", False),
    ],
)
def test_what_nvidia_smi_counts(out: str, fit: bool) -> None:
    found = preflight.smi_finding("ecc", "errors", out, "0")
    assert found.fit is fit
    assert fit or ("1 has 3" in found.facts or "0A:00.0 has Yes" in found.facts)


def test_only_fresh_xids_of_the_hardware_count() -> None:
    log = (
        "[   10.000000] NVRM: Xid (PCI:0000:07:00): 79, pid=1, GPU has fallen off the bus.\n"
        "[100000.000000] NVRM: Xid (PCI:0000:0a:00): 31, pid=2, a program's bad address\n"
    )
    assert preflight.xid_finding(log, uptime=100_010.0).fit
    found = preflight.xid_finding(log, uptime=20.0)
    assert not found.fit and found.facts == "Xid 79 of 0000:07:00"


def test_a_child_that_dies_or_raises_is_told_apart_from_a_result() -> None:
    died, raised, fine = preflight_devices.in_children(_misbehave, [("die",), ("raise",), ("work",)])
    assert isinstance(died, preflight_devices.ChildError) and "died" in str(died)
    assert isinstance(raised, preflight_devices.ChildError) and "ArithmeticError: wrong" in str(raised)
    assert fine == "done"


def _misbehave(how: str) -> str:
    if how == "die":
        os._exit(9)
    if how == "raise":
        raise ArithmeticError("wrong")
    return "done"


@pytest.mark.parametrize("nodes", range(2, 10))
def test_a_bad_node_is_found_by_its_pairs(nodes: int) -> None:
    rounds = pair_rounds(nodes)
    for _, groups in rounds:
        members = [i for group in groups for i in group]
        assert len(members) == len(set(members)), "a node is in two pairs of one round"
    pairs = [tuple(group) for _, groups in rounds for group in groups]
    for bad in range(nodes):
        found = guilty_nodes(nodes, {pair: bad not in pair for pair in pairs})  # type: ignore[misc]
        # Of two nodes either may be to blame; of more, the one that is bad with both neighbours.
        assert found == ([0, 1] if nodes == 2 else [bad])
    assert guilty_nodes(nodes, dict.fromkeys(pairs, True)) == []  # type: ignore[arg-type]


def test_wrong_clocks() -> None:
    names = ["a", "b", "c", "d"]
    assert wrong_clocks(names, [0.0, 0.1, -0.2, 0.0], 2) == {}
    assert list(wrong_clocks(names, [0.0, 0.1, 90.0, 0.0], 2)) == ["c"]
    assert list(wrong_clocks(names, [0.0, 90.0, 90.2, 89.9], 2)) == ["a"], "the first node's own clock is off"
    assert list(wrong_clocks(names[:2], [0.0, 90.0], 2)) == ["b"]
    assert wrong_clocks(names, [0.0, None, 0.1, 0.0], 2) == {"b": "fell silent"}
