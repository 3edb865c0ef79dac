"""What `lmp doctor` finds, here and where something is broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lmp.cli import main
from lmp.model import Segments, attention
from lmp.model.backends import BACKENDS, Backend
from lmp.scaling.doctor import examine, lines, try_backend


def test_findings_as_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["distributed"]["gloo"] is torch.distributed.is_gloo_available()
    assert found["slurm"]["job"]["SLURM_JOB_ID"] == "4711"
    assert 0 < found["limits"]["open_files"] <= found["limits"]["open_files_hard"]
    assert 0 < found["disk"]["free_gib"] <= found["disk"]["total_gib"]
    assert 0 < found["machine"]["available_gib"] <= found["machine"]["memory_gib"]
    assert len(found["devices"]) == torch.cuda.device_count()
    backends = found["attention"]["backends"]
    assert set(backends) == set(BACKENDS)
    for backend in backends.values():
        assert backend["available"] == (backend["reason"] is None) == (backend["deviation"] is not None)
    assert backends["sdpa"]["deviation"] < 0.02
    if not torch.cuda.is_available():
        assert backends["flash3"]["reason"] == "runs on CUDA devices only, not on cpu"
        assert found["attention"]["auto"] == "sdpa"


ANSWER = """Configuration data as of 2026-01-01T00:00:00
AccountingStorageType   = accounting_storage/none
JobRequeue              = 1
PreemptMode             = REQUEUE
SLURM_VERSION           = 22.05.8
"""


@pytest.mark.parametrize("answers", [True, False])
def test_what_a_cluster_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: bool) -> None:
    command = tmp_path / "scontrol"
    command.write_text(f"#!/bin/sh\ncat <<'END'\n{ANSWER}END\n" if answers else "#!/bin/sh\necho no host >&2; exit 1\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = examine()
    told = "\n".join(lines(found))
    if answers:
        assert found["slurm"]["cluster"]["settings"]["JobRequeue"] == "1"
        assert "accounting_storage/none" in told
    else:
        assert found["slurm"]["cluster"] == {"answers": False, "reason": "no host"}
        assert "the cluster does not answer: no host" in told


def test_extras_name_what_they_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    from lmp.scaling import doctor

    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: {"matplotlib": None, "av": "13.0"}.get(name, real(name)))
    extras = examine()["extras"]
    assert extras["report"] == {"missing": ["matplotlib>=3.9"], "install": "pip install 'lmp[report]'"}
    assert "av>=14" in extras["films"]["missing"]


def test_findings_for_people_and_a_kernel_that_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*tensors: Tensor, **segments: Segments) -> Tensor:
        raise RuntimeError("no kernel image is available\nfor execution on the device")

    monkeypatch.setitem(BACKENDS, "flash2", Backend("flash2", broken, lambda device, dtype, head_dim: None))
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "flash2        no: fails when run: no kernel image is available\n" in text
    assert "sdpa          yes, " in text
    assert f"torch         {torch.__version__}\n" in text


def test_a_wrong_kernel_is_far_from_fp64() -> None:
    def leaking(q_THC: Tensor, k_THC: Tensor, v_THC: Tensor, *, q_segments: Segments, k_segments: Segments) -> Tensor:
        whole = (Segments.from_lengths([s.total]) for s in (q_segments, k_segments))
        return attention(q_THC, k_THC, v_THC, q_segments=next(whole), k_segments=next(whole))

    def deviation(attend: object) -> float:
        backend = Backend("test", attend, lambda device, dtype, head_dim: None)  # type: ignore[arg-type]
        return try_backend(backend, device="cpu", dtype=torch.float32, head_dim=32)

    assert deviation(attention) < 1e-5
    assert deviation(leaking) > 0.1
