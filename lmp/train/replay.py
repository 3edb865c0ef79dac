"""Any step of a run made again on one machine: its packs, films, shots, tensors and masks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from lmp.config import Config, load_config
from lmp.data.index import FilmIndex
from lmp.data.loader import read_pack
from lmp.data.plan import Pack
from lmp.data.stream import Cursor, Stream
from lmp.errors import UserError
from lmp.train.data import load_index, plan_settings
from lmp.train.run_folder import RunFolder
from lmp.train.step import objective_batch


@dataclass(frozen=True)
class Replay:
    """A step of a run as its plan has it.

    Attributes:
        step: of the run, from 1.
        cursor: its place in the stream.
        packs: in order of slots.
        fingerprint: see Stream.fingerprint.
        logged: the fingerprint that the run logged for this step; None if it has not made it.
    """

    config: Config
    index: FilmIndex
    step: int
    cursor: Cursor
    packs: tuple[Pack, ...]
    fingerprint: str
    logged: str | None

    def lines(self) -> list[str]:
        """What the step shows, for a person."""
        place = f"epoch {self.cursor.epoch}, step {self.cursor.step}"
        said = "as the run logged" if self.logged else "not made yet"
        lines = [f"step {self.step}: {place}, {len(self.packs)} packs, data {self.fingerprint} ({said})"]
        for slot, pack in enumerate(self.packs):
            shown = ", ".join(f"{self.index.keys[w.film]} {w.start}:{w.stop}" for w in pack.windows)
            idle = f", idle {sum(pack.idle)}" if pack.idle else ""
            lines.append(f"slot {slot}, pack {pack.epoch}/{pack.number}: {shown}{idle}")
        return lines

    def tensors(self, slot: int) -> dict[str, Tensor]:
        """What the model is given for a pack, by name: NAME, NAME_valid, NAME_masked, film_P, shot_P, ..."""
        pack = read_pack(self.index, self.packs[slot], slot, start=0, stop=self.config.data.pack_shots)
        view = objective_batch(pack, self.config)
        found = dict(pack.features)
        found |= {f"{name}_valid": valid_P for name, valid_P in pack.valid.items()}
        found |= {f"{name}_masked": masked_P for name, masked_P in view.masked.items()}
        places = ("film_P", "shot_P", "position_P", "segment_P", "time_P")
        return found | {name: getattr(pack, name) for name in places}

    def write(self, out: Path) -> None:
        """All tensors into a safetensors file, each named SLOT/NAME; appears whole or not at all."""
        everything = {
            f"{slot}/{name}": tensor.contiguous().clone()
            for slot in range(len(self.packs))
            for name, tensor in self.tensors(slot).items()
        }
        partial = out.with_name(out.name + ".tmp")
        try:
            save_file(everything, partial, metadata={"step": str(self.step), "data": self.fingerprint})
            partial.replace(out)
        except OSError as error:
            raise UserError(f"{out} cannot be written: {error}", remedy="give another file") from error
        finally:
            partial.unlink(missing_ok=True)


def replay(run: Path, step: int, overrides: Sequence[str] = ()) -> Replay:
    """Find a step of a run.

    Args:
        run: its folder.
        step: from 1; one that the run has not made yet is what it would show.
        overrides: laid over the run's configuration, for shards that lie elsewhere now.

    Raises:
        UserError: no run, no such step, data that are not the step's, or a plan that is not what the run logged.
    """
    folder = RunFolder(run)
    if not folder.config.is_file():
        raise UserError(f"{run}: is not a run folder (no config.yaml)", remedy="give the folder of a run")
    if step < 1:
        raise UserError(f"step {step}: the steps of a run are numbered from 1", remedy="give --step 1 or more")
    config = load_config(folder.config, overrides)
    index = load_index(config)
    stream = Stream.of(index, plan_settings(config, index))
    start, begun, digest = _start_of(folder, step)
    if digest not in (None, index.digest):
        raise UserError(
            f"{run}: step {step} was made from other data (digest {digest[:12]}, now {index.digest[:12]})",
            remedy="give the shards of then: data.train=[...]",
        )
    cursor = stream.locate(step - 1 - begun, start)
    fingerprint, logged = stream.fingerprint(cursor), _logged(folder, step)
    if logged not in (None, fingerprint):
        raise UserError(
            f"{run}: the plan of step {step} is {fingerprint}, the run logged {logged}",
            remedy="use the version of lmp that code.json names and the configuration that the run had then",
        )
    return Replay(config, index, step, cursor, stream.packs(cursor), fingerprint, logged)


def _start_of(folder: RunFolder, step: int) -> tuple[Cursor | None, int, str | None]:
    """Where the start that made the step began: cursor, steps made by then, digest of its data."""
    found: tuple[Cursor | None, int, str | None] = (None, 0, None)
    for line in folder.ledger.read_text(encoding="utf-8").splitlines() if folder.ledger.is_file() else []:
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue  # cut off by a kill
        if event["event"] in ("start", "rollback") and event["step"] < step:
            found = (Cursor(**event["cursor"]), event["step"], event["data"])
    return found


def _logged(folder: RunFolder, step: int) -> str | None:
    if folder.metrics.is_file():
        for line in reversed(folder.metrics.read_text(encoding="utf-8").splitlines()):
            try:
                facts = json.loads(line)
            except json.JSONDecodeError:
                continue
            if facts["step"] == step:
                return facts["data"]
    return None
