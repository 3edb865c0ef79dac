"""Makes golden_transnet.json with the publishers' code, which is not part of this project.

    git clone https://github.com/soCzech/TransNetV2 FOLDER
    PYTHONPATH=.:FOLDER/inference-pytorch:FOLDER/inference python tests/films/make_golden_transnet.py

Made at commit 85cef72af9a916bdfd7cc94a670c9cdfbf12d1ed. The tests rebuild weights and frames by `recipes`.
The network is that of `transnetv2_pytorch`; windows and scenes are those of `transnetv2`, whose few calls of
TensorFlow are answered by torch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from tests.films.recipes import film_frames, seeded_weights


@torch.no_grad()
def main() -> None:
    sys.modules["tensorflow"] = SimpleNamespace(  # type: ignore[assignment]
        cast=lambda frames, dtype: torch.from_numpy(frames), float32=None, sigmoid=torch.sigmoid
    )
    import transnetv2
    from transnetv2_pytorch import TransNetV2

    network = TransNetV2()
    network.load_state_dict(seeded_weights(network))
    procedure = transnetv2.TransNetV2.__new__(transnetv2.TransNetV2)  # its own start reads TensorFlow's weights
    procedure._input_size, procedure._model = (27, 48, 3), network
    frames = film_frames(130, 27, 48)
    single, every = network(torch.from_numpy(frames[None, :100]))
    told, _ = procedure.predict_frames(frames)
    # The widest gap between predictions near the middle, so that rounding moves none across.
    ranked = np.sort(told)[40:90]
    gap = int(np.diff(ranked).argmax())
    threshold = round(float(ranked[gap : gap + 2].mean()), 4)
    golden = {
        "single": single[0, ::5, 0].tolist(),
        "every": every["many_hot"][0, ::5, 0].tolist(),
        "predictions": told.tolist(),
        "threshold": threshold,
        "scenes": procedure.predictions_to_scenes(told, threshold).tolist(),
    }
    path = Path(__file__).with_name("golden_transnet.json")
    path.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
