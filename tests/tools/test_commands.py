"""What all converters have in common on the command line."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import tools

ROOT = Path(tools.__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "tools").glob("*.py") if not path.stem.startswith("_"))


@pytest.mark.parametrize("name", NAMES)
def test_each_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"tools.{name}").main(["--help"])
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("export")])
def test_a_run_that_is_none_is_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    further = {"export_features": [str(tmp_path), "--format", "npy"]}.get(name, [])
    out = tmp_path / ("out.pt" if name == "export_state_dict" else "out")
    assert importlib.import_module(f"tools.{name}").main([str(tmp_path / "none"), str(out), *further]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert len(captured.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_python_m(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.export_huggingface", str(tmp_path / "none"), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
