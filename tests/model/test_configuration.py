"""What a configuration accepts, refuses and keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmp.model import LmpConfig

ONE = {"tokens": 1, "width": 4}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"width": 18, "heads": 4}, "width 18 is not a multiple of heads 4"),
        ({"target": "smell"}, "target 'smell' is not a modality"),
        ({"sources": ["smell"]}, r"sources \['smell'\] are not modalities"),
        ({"sources": ["text", "text"]}, "hold a name twice"),
        ({"sources": []}, "no sources to reconstruct"),
        (
            {"modalities": {"video": ONE}, "contextual_layers": 1},
            "add a second modality, or name the sources",
        ),
        ({"modalities": {"video": ONE, "a.b": ONE}, "contextual_layers": 1}, "modality name 'a.b'"),
        ({"modalities": {"video": ONE, "keys": ONE}, "contextual_layers": 1}, "modality name 'keys'"),
        ({"modalities": {"video": ONE, "text": {"tokens": 0, "width": 4}}}, "tokens >= 1"),
        ({"modalities": {"video": ONE, "text": {"dim": 4}}}, "give it tokens"),
        ({"modality_order": ["video"]}, "modality_order"),
        ({"contextual_layers": {"video": 1}}, "name each of"),
        ({"contextual_layers": -1}, "contextual_layers is -1"),
        ({"cross_layers": 0}, "cross_layers is 0"),
        ({"width": 16.0}, "width is 16.0: give a whole number"),
        ({"positions": "alphabetical"}, "positions 'alphabetical' are unknown"),
        ({"positions": "rope", "width": 6, "heads": 2}, "even head dimension"),
        ({"initial_temperature": 0.01}, "must be above"),
        ({"mlp_ratio": 0}, "mlp_ratio"),
    ],
)
def test_contradictions_are_refused(make_config: Callable[..., LmpConfig], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_config(**changes)


def test_all_faults_are_told_at_once(make_config: Callable[..., LmpConfig]) -> None:
    with pytest.raises(ValueError, match=r"smell.*cross_layers.*alphabetical"):
        make_config(target="smell", cross_layers=0, positions="alphabetical")


def test_defaults_are_the_papers_modalities() -> None:
    config = LmpConfig()
    assert list(config.modalities) == ["video", "audio", "text"]
    assert config.sources == ["audio", "text"]


def test_one_modality_may_read_itself() -> None:
    assert LmpConfig(modalities={"video": ONE}, sources=["video"]).sources == ["video"]


def test_saved_and_loaded_alike(make_config: Callable[..., LmpConfig], tmp_path: Path) -> None:
    # In an order that no sorting yields, and partly equal to the defaults.
    modalities = {"video": {"tokens": 1, "width": 512}, "text": ONE, "audio": ONE}
    config = make_config(modalities=modalities, positions="rope", mlp_ratio=2.5)
    config.save_pretrained(tmp_path)
    loaded = LmpConfig.from_pretrained(tmp_path)
    assert list(loaded.modalities.items()) == list(modalities.items())
    before, after = config.to_dict(), loaded.to_dict()
    assert {key: after[key] for key in before if key != "transformers_version"} == {
        key: value for key, value in before.items() if key != "transformers_version"
    }
