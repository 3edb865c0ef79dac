"""A small study for tests: a configuration in a file of its own, shards with learnable structure."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml

from tests.runs import config_of, make_shards, write_config

EXTERNAL = ("http:", "https:", "//", "file:")


def study_of(folder: Path, **keys: Any) -> dict[str, Any]:
    """The mapping of a study file whose base is written beside it; `keys` are laid over it."""
    for name, seed in (("train", 0), ("held-out", 1)):
        if not (folder / name).exists():
            make_shards(folder / name, films=6, shots=20, seed=seed)
    data = {"pack_shots": 16, "packs_per_step": 2}
    write_config(folder / "base.yaml", config_of(folder / "train", data=data, checkpoint={"every_steps": 2}))
    study: dict[str, Any] = {
        "name": "tiny",
        "base": "base.yaml",
        "grid": {"data.window_shots": [8, 16]},
        "seeds": [0, 1],
        "budget": {"steps": 8},
    }
    return {**study, **keys}


def write_study(folder: Path, **keys: Any) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study_of(folder, **keys), sort_keys=False), encoding="utf-8")
    return path


def ledger(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]


class Page(HTMLParser):
    """What a page holds; feeding it fails where tags do not match."""

    VOID = ("meta", "br", "path", "use", "rect", "link", "hr", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id" and value:
                self.ids.append(value)
            if name in ("href", "src", "xlink:href") and value:
                self.links.append(value)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.rows and "table" in self.open and any(t in self.open for t in ("td", "th")):
            self.rows[-1][-1] += data

    @property
    def external(self) -> list[str]:
        return [link for link in self.links if link.startswith(EXTERNAL)]

    @property
    def dangling(self) -> list[str]:
        return [link for link in self.links if link.startswith("#") and link[1:] not in self.ids]
