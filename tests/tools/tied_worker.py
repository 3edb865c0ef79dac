"""One rank of a run of a model with a tied weight: python -m tests.tools.tied_worker FOLDER (with a config.yaml)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lmp.config import load_config
from lmp.model import LmpForPretraining
from lmp.train.trainer import train
from tests.workers import save_findings

TIED, FIRST = "contextual.text.layers.0.mlp.fc1.weight", "contextual.audio.layers.0.mlp.fc1.weight"


def tie(made: Any) -> Any:
    """LmpForPretraining.__init__, after which two transformers share a matrix."""

    def tied(self: LmpForPretraining, config: Any) -> None:
        made(self, config)
        text, audio = (self.lmp.contextual[name].layers[0].mlp.fc1 for name in ("text", "audio"))
        text.weight = audio.weight

    return tied


def main(folder: Path) -> None:
    LmpForPretraining.__init__ = tie(LmpForPretraining.__init__)  # type: ignore[method-assign]
    outcome = train(load_config(folder / "config.yaml"), folder / "run")
    save_findings(folder, {"finished": outcome.finished})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
