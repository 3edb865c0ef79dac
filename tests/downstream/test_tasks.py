"""The benchmarks: label files as published, cases worked by hand, and the command from shards to a report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from lmp.cli import main
from lmp.data.index import FilmIndex
from lmp.data.leave_out import LeaveOut
from lmp.data.record import FilmRecord
from lmp.data.shards import ShardWriter
from lmp.downstream import real_data as real_data_module
from lmp.downstream.tasks import TASKS, ave, boundaries, condensed_movies, lvu, muses, select, soundtrack
from lmp.downstream.tasks.base import Videos
from lmp.downstream.tasks.moviecuts import MovieCuts
from lmp.downstream.trunk import Films, base_features
from lmp.errors import UserError
from lmp.model import LmpConfig, LmpForPretraining

SHOTS = 12
SHOT_MS = 10_000


def write_shards(
    folder: Path, films: Mapping[str, dict[str, Any]], *, classes: Mapping[str, int] | None = None
) -> Path:
    """Films of 12 shots of 10 s; video and audio share a random state, and show the film's class where it has one."""
    random = np.random.default_rng(3)
    classes = classes or {}
    edges = np.arange(SHOTS + 1, dtype=np.int32) * SHOT_MS
    with ShardWriter(folder, encoders={}, films_per_shard=8) as writer:
        for key, info in films.items():
            shots = int(info.pop("shots", SHOTS))
            own = random.standard_normal((shots, 6)) * 0.3 + random.standard_normal(6)
            if key in classes:
                own = own * 0.2 + 3 * np.eye(6)[classes[key]]
            rows = {"video": own, "audio": own @ np.ones((6, 5)) * 0.1 + own[:, :5]}
            features = {name: torch.from_numpy(x).half()[:, None] for name, x in rows.items()}
            valid = {name: torch.ones(shots, dtype=torch.bool) for name in rows}
            writer.write(FilmRecord(key, info, np.stack([edges[:-1], edges[1:]], 1)[:shots], features, valid))
    return folder


def videos_of(folder: Path) -> Videos:
    return Videos(Films(FilmIndex.load(folder)))


def exported(folder: Path) -> Path:
    """An untrained model as export_huggingface leaves it, with heads."""
    torch.manual_seed(1)
    shapes = {"video": {"tokens": 1, "width": 6}, "audio": {"tokens": 1, "width": 5}}
    shape = {"width": 16, "heads": 2, "contextual_layers": 1, "cross_layers": 1, "contrastive_width": 8}
    LmpForPretraining(LmpConfig(modalities=shapes, positions="rope", **shape)).save_pretrained(folder)
    left_out = {"files": ["test.txt"], "ids": 9, "digest": "0" * 64, "films": 2, "shots": 5}
    (folder / "fingerprint.json").write_text(json.dumps({"run": "tiny", "step": 7, "left_out": left_out}))
    return folder


def lvu_files(folder: Path, kind: str, lines: Mapping[str, list[str]]) -> Path:
    (folder / kind).mkdir(parents=True)
    for split in ("train", "val", "test"):
        text = "\n".join(["class_id class_name youtube_id imdb_id", *lines.get(split, [])])
        (folder / kind / f"{split}.csv").write_text(text + "\n")
    return folder


def test_lvu_labels_are_read_from_the_right(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("class_id class_name youtube_id imdb_id\n0 \\N -_a tt1\n9 Kubrick b tt2\n")
    found = lvu.read_labels(path, "writer")
    assert [(one.video, one.film, one.value, one.text) for one in found] == [
        ("-_a", "tt1", 0, "\\N"),
        ("b", "tt2", 9, "Kubrick"),
    ]
    path.write_text("like_count dislike_count youtube_id imdb_id\n90 10 a tt1\n")
    assert lvu.read_labels(path, "like_ratio")[0].value == pytest.approx(9 - 9.138220535629456, abs=1e-12)
    path.write_text("view_count youtube_id imdb_id\n1000 a tt1\n")
    assert lvu.read_labels(path, "view_count")[0].value == pytest.approx(math.log(1000) - 11.76425435683139, abs=1e-12)
    path.write_text("head\n10 Nobody a tt1\n")
    with pytest.raises(UserError, match=r"line 2.*does not fit writer"):
        lvu.read_labels(path, "writer")


def test_lvu_files_as_published(real_data: Path) -> None:
    sizes = {"genre": (3063, 597, 647), "writer": (769, 174, 168), "view_count": (577, 124, 126)}
    for kind, wanted in sizes.items():
        found = select(f"lvu/{kind}")[0].ids(real_data / "lvu")
        assert tuple(len(found[split]) for split in ("train", "val", "test")) == wanted
    train = lvu.read_labels(real_data / "lvu" / "writer" / "train.csv", "writer")
    assert sum(one.text == "\\N" for one in train) == 261
    assert {int(one.value) for one in train} == {0, 1, 2, 5, 6, 7, 9}


def test_lvu_windows_by_hand() -> None:
    edges = np.arange(0, 90, 10.0)  # 80 s in shots of 10 s
    shots = np.stack([edges[:-1], edges[1:]], 1)
    # Windows begin at 0, 1, ..., 20. At 0: shots 0-5. At 1-9: 0-6. At 10: 1-6. At 11-19: 1-7. At 20: 2-7.
    assert lvu.spans(shots, stride=1) == [(0, 6, 1), (0, 7, 9), (1, 7, 1), (1, 8, 9), (2, 8, 1)]
    assert lvu.spans(shots[:3], stride=1) == [(0, 3, 1)]


def test_lvu_sums_the_softmax_of_windows(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "s", {"a": {"shots": 7}, "b": {}, "c": {"shots": 6}})
    labels = lvu_files(
        tmp_path / "l", "genre", {"train": ["0 x b t"], "val": ["0 x zz t"], "test": ["1 x a t", "2 y c t"]}
    )
    items, coverage = select("lvu/genre")[0].items(labels, videos_of(shards))  # type: ignore[union-attr]
    assert str(coverage) == "found train 1 of 1, val 0 of 1, test 2 of 2, missed zz"
    chosen = items.of_split("test")
    # a: 70 s, windows at 0 (1 of 11), 1..9 (9 of 11), 10 (1 of 11); c: one window.
    assert items.weight_I[chosen].tolist() == pytest.approx([1 / 11, 9 / 11, 1 / 11, 1])
    # One window is nearly sure of class 0; nine lean to class 1: their sum wins, while the mean logit says 0.
    sure, lean, other = [99.0, 0, 0, 0], [0.0, 1, 0, 0], [0.0, 0, 5, 0]
    task = select("lvu/genre")[0]
    assert task.scores(items, chosen, np.array([sure, lean, sure, other])) == {"accuracy": 1.0}  # type: ignore[union-attr, call-arg]
    lean_less = [0.0, -3, -3, -3]
    assert task.scores(items, chosen, np.array([sure, lean_less, sure, other])) == {"accuracy": 0.5}  # type: ignore[union-attr, call-arg]


def test_lvu_regression_squares_once_a_video(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "s", {"a": {"shots": 7}, "c": {"shots": 6}})
    labels = lvu_files(tmp_path / "l", "view_count", {"train": ["5 c t"], "val": ["5 c t"], "test": ["7 a t", "9 c t"]})
    task = select("lvu/view_count")[0]
    items, _ = task.items(labels, videos_of(shards))  # type: ignore[union-attr]
    chosen = items.of_split("test")
    true = [math.log(7) - 11.76425435683139, math.log(9) - 11.76425435683139]
    output = np.array([[true[0] + 11], [true[0] - 11 / 9], [true[0] + 11], [true[1] + 2]])
    # a: 11/11 - 9/11 * 11/9 + 11/11 = 1 above the truth; c: 2 above.
    assert task.scores(items, chosen, output)["squared_error"] == pytest.approx((1 + 4) / 2, abs=1e-4)  # type: ignore[union-attr, call-arg]


def test_condensed_movies_drops_every_copy_of_a_description(tmp_path: Path) -> None:
    (tmp_path / "descriptions.csv").write_text('imdbid,videoid,description\nt1,a,"x, y"\nt1,b,same\nt2,c,same\n')
    (tmp_path / "split.csv").write_text("imdbid,split\nt1,train\nt2,test\n")
    assert condensed_movies.descriptions(tmp_path) == {"a": ("t1", "x, y")}
    assert select("condensed_movies")[0].ids(tmp_path) == {"train": ["a", "b"], "val": [], "test": ["c"]}


def test_condensed_movies_as_published(real_data: Path) -> None:
    found = condensed_movies.descriptions(real_data / "condensed_movies")
    assert len(found) == 34_091 - 44


def test_movieclip_as_published(real_data: Path) -> None:
    found = select("movieclip/hidden")[0].ids(real_data)
    assert {split: len(clips) for split, clips in found.items()} == {"train": 4939, "val": 659, "test": 1313}


def test_what_is_shown_around_a_hidden_shot(tmp_path: Path) -> None:
    numbers = {"a" * 11: range(1, 6), "b" * 11: range(3, 8), "c" * 11: range(2, 4)}  # the last one has too few shots
    lines = [f"{clip}/{clip}-Scene-{n}.mp4 {n} 99" for clip, shots in numbers.items() for n in shots]
    (tmp_path / "all_150_labels.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "split.csv").write_text("imdbid,split\nt1,test\n")
    (tmp_path / "clips.csv").write_text("videoid,imdbid\n" + "".join(f"{clip},t1\n" for clip in numbers))
    clips = [("c" * 11, 0, 2), ("a" * 11, 2, 7), ("b" * 11, 7, 12)]
    info = {"clips": [{"videoid": name, "start": start, "stop": stop} for name, start, stop in clips]}
    videos = videos_of(write_shards(tmp_path / "s", {"t1": info}))

    seen = {}
    for shown in ("hidden", "film", "alone"):
        items, coverage = select(f"movieclip/{shown}")[0].items(tmp_path, videos)  # type: ignore[union-attr]
        assert str(coverage) == "found test 2 of 2"
        assert [np.flatnonzero(row).tolist() for row in items.target_I] == [
            [n, 99] for n in (*range(1, 6), *range(3, 8))
        ]
        windows = [items.windows[n] for n in items.window_I]
        # Each item is about a shot that is hidden in its window.
        for shot, window, ((start, stop),) in zip(range(2, 12), windows, items.parts_IP2, strict=True):
            assert stop == start + 1 and start in window.hidden and window.rows_S[start] == shot
        seen[shown] = [(window.rows_S.tolist(), list(window.hidden)) for window in windows]
    assert seen["hidden"][1] == ([2, 3, 4, 5, 6], [1])
    assert seen["alone"][1] == ([3], [0])
    assert seen["film"][1] == (list(range(12)), [3, 11]) == seen["film"][9]

    two = replace(videos.whole(0).window(), hidden=(3, 11))
    (raw,) = base_features(SimpleNamespace(modalities=("video",))).run(videos.films, [two])  # type: ignore[arg-type]
    assert raw["video"][[3, 11]].abs().sum() == 0 and (raw["video"][[0, 4, 10], -1] == 1).all()


def test_shards_of_the_study(real_data: Path, tmp_path: Path) -> None:
    manifest = real_data_module.write_open_films(real_data, tmp_path / "s", overwrite=False)
    assert (manifest["films"], manifest["shots"]) == (15, 3092)
    items, coverage = select("boundaries")[0].items(real_data / "ovsd", videos_of(tmp_path / "s"))  # type: ignore[union-attr]
    assert str(coverage).startswith("found test 15 of 21")
    assert (len(items), int(items.target_I.sum())) == (3077, 274)


def test_a_films_clips_keep_their_order_and_listed_ones_are_refused(tmp_path: Path) -> None:
    shots = {"a": [(2, (3, 5)), (4, (0,))], "b": [(1, (7,))], "c": [(1, (1,))]}
    text = {"a": np.ones(real_data_module.TEXT_WIDTH, np.float32)}
    movies = real_data_module.Movies(shots, {"tt1": ["b", "a", "c"]}, {"tt1": "T"}, {"tt1": "train"}, text)
    leave_out = LeaveOut(frozenset({"c"}), ("l",))
    _, refused = real_data_module.write_movies(
        movies, tmp_path / "s", splits=["train"], leave_out=leave_out, overwrite=False
    )
    index = FilmIndex.load(tmp_path / "s")
    film = index.read(0, 0, 3)
    assert refused == 1
    assert film.shots_N2.tolist() == [[0, 4000], [8000, 12000], [16000, 20000]]
    assert [row.nonzero().flatten().tolist() for row in film.features["video"][:, 0]] == [[7], [3, 5], [0]]
    assert film.valid["text"].tolist() == [False, True, True]
    assert index.info(0)["clips"] == [
        {"videoid": "b", "start": 0, "stop": 1},
        {"videoid": "a", "start": 1, "stop": 3},
    ]


def test_moviecuts_as_published(real_data: Path) -> None:
    content = MovieCuts()._read(real_data / "moviecuts", "val")
    counts = np.array([one["labels"] for one in content["annotations"].values()]).sum(0).tolist()
    assert counts == [2542, 1296, 1194, 1538, 93, 693, 9192, 1680, 2082, 4889]


def test_ave_ordering_shows_shots_shuffled_and_scores_the_true_order(tmp_path: Path) -> None:
    (tmp_path / "split.json").write_text(json.dumps({"train": ["a"], "test": ["b"]}))
    task = ave.ShotOrdering()
    items, _ = task.items(tmp_path, videos_of(write_shards(tmp_path / "s", {"a": {}, "b": {}})))
    assert len(items) == 2 * (SHOTS // 3)
    shown = np.stack([window.rows_S for window in items.windows])
    restored = np.stack([rows[list(task.orders[t])] for rows, t in zip(shown, items.target_I, strict=True)])
    assert (np.diff(restored, axis=1) == 1).all()
    assert len({tuple(np.diff(rows)) for rows in shown}) > 1
    chosen = items.of_split("test")
    perfect = np.eye(6)[items.target_I[chosen]]
    assert task.scores(items, chosen, perfect) == {"order_accuracy": 1.0, "kendall_tau": 1.0}


def test_ave_next_shot_asks_one_right_of_five(tmp_path: Path) -> None:
    (tmp_path / "split.json").write_text(json.dumps({"test": ["a"]}))
    task = ave.NextShot()
    items, _ = task.items(tmp_path, videos_of(write_shards(tmp_path / "s", {"a": {}})))
    assert len(items) == 5 * len(np.unique(items.group_I))
    for window, right in zip(items.windows, items.target_I, strict=True):
        assert len(window.rows_S) == 5
        assert (window.rows_S[4] == window.rows_S[3] + 1) == right
    chosen = np.arange(len(items))
    assert task.scores(items, chosen, items.target_I[:, None].astype(float)) == {"accuracy": 1.0}
    assert task.scores(items, chosen, np.zeros((len(items), 1)))["accuracy"] == pytest.approx(0.2)


def test_ave_attributes_by_overlap(tmp_path: Path) -> None:
    def shot(start: Any, end: Any, size: str) -> dict[str, Any]:
        return {"start-time": start, "end-time": end, "shot-size": [size]}

    scenes = {"a": {"0": shot(0, 12, "wide"), "1": shot("0:00:12", "0:00:29.5", "close-up")}}
    (tmp_path / "annotations.json").write_text(json.dumps(scenes))
    (tmp_path / "split.json").write_text(json.dumps({"train": ["a"]}))
    items, _ = ave.Attribute("shot-size").items(tmp_path, videos_of(write_shards(tmp_path / "s", {"a": {}})))
    assert [items.facts["names"][t] for t in items.target_I] == ["wide", "close-up", "close-up"]
    with pytest.raises(UserError, match="no shot has shot-angle"):
        ave.Attribute("shot-angle").items(tmp_path, videos_of(tmp_path / "s"))


def test_muses_proposals_by_hand() -> None:
    shots = np.stack([np.arange(6.0), np.arange(1.0, 7)], 1)
    spans, scores = muses.proposals(np.array([0.0, 0.9, 0.9, 0.0, 0.0, 0.5]), shots)
    assert spans.tolist() == [[1, 3], [5, 6]]
    assert scores.tolist() == pytest.approx([0.9, 0.5])


def test_muses_reads_and_scores_activitynet(tmp_path: Path) -> None:
    events = [{"label": "kiss", "segment": [20, 40]}, {"label": "run", "segment": [55, 66]}]
    one = {"duration": 120, "annotations": events}
    database = {"a": {"subset": "training", **one}, "b": {"subset": "validation", **one}}
    (tmp_path / "annotations.json").write_text(json.dumps({"database": database}))
    task = muses.EventLocalisation()
    items, _ = task.items(tmp_path, videos_of(write_shards(tmp_path / "s", {"a": {}, "b": {}})))
    chosen = items.of_split("test")
    target = items.target_I[chosen]
    assert target[:, 0].nonzero()[0].tolist() == [2, 3]
    assert target[:, 1].nonzero()[0].tolist() == [5, 6]  # half of shot 5, six tenths of shot 6
    perfect = task.scores(items, chosen, 20 * target - 10)
    # kiss is exact; run is [50, 70] for [55, 66]: tIoU 0.55.
    assert perfect["mAP@0.5"] == 1.0
    assert perfect["mAP@0.6"] == 0.5


def test_soundtrack_galleries_are_of_one_size_and_seeded() -> None:
    scores = torch.from_numpy(np.random.default_rng(0).standard_normal((40, 40)))
    one, again, other = (soundtrack.gallery_ranks(scores, gallery=10, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert one.max() <= 9
    assert torch.equal(soundtrack.gallery_ranks(scores + 99 * torch.eye(40), gallery=10, seed=0), torch.zeros(40))
    whole = soundtrack.gallery_ranks(scores, gallery=40, seed=0)
    assert torch.equal(whole, (scores > scores.diagonal()[:, None]).sum(1).double())


def test_boundaries_go_to_the_nearest_shot_end() -> None:
    shots = np.array([[0, 9], [10, 19], [20, 29], [30, 39]])
    assert boundaries.boundary_gaps(shots, np.array([[0, 20], [21, 39]])).tolist() == [False, True, False]
    assert boundaries.boundary_gaps(shots, np.array([[0, 14], [15, 39]])).tolist() == [True, False, False]
    scenes = boundaries.scenes_of(np.array([False, True, False]), shots)
    assert scenes.tolist() == [[0, 19], [20, 39]]


def test_open_films_have_the_published_counts(real_data: Path) -> None:
    gaps = marked = 0
    for path in sorted((real_data / "ovsd").glob("*/film.npz")):
        with np.load(path) as film:
            if "features_vgg19" in film:
                found = boundaries.read_gaps(real_data / "ovsd", path.parent.name, len(film["shots"]))
                gaps, marked = gaps + len(found), marked + int(found.sum())
    assert (gaps, marked) == (3077, 274)


def test_similarity_windows_are_what_they_say() -> None:
    rows = torch.randn(23, 7, generator=torch.Generator().manual_seed(0))
    found = boundaries.similarity_windows(rows)
    unit = normalize(rows, dim=1)
    for gap in (0, 3, 21):
        wanted = [unit[gap] @ unit[gap + 1]]
        for reach in boundaries.REACHES:
            left, right = unit[max(0, gap + 1 - reach) : gap + 1], unit[gap + 1 : gap + 1 + reach]
            across = left @ right.T
            middle = normalize(left.mean(0), dim=0) @ normalize(right.mean(0), dim=0)
            wanted += [across.mean(), across.max(), middle, (left @ left.T).mean(), (right @ right.T).mean()]
        assert torch.allclose(found[gap], torch.stack(wanted), atol=1e-5)


def test_videos_are_found_by_key_record_and_clip(tmp_path: Path) -> None:
    clips = [{"videoid": "c1", "start": 2, "stop": 5}]
    films = {"k": {"videoid": "v"}, "f": {"imdbid": "tt1", "clips": clips}, "g": {"imdbid": "tt1"}}
    videos = videos_of(write_shards(tmp_path / "s", films))
    found = {name: videos.find(name) for name in ("k", "v", "c1", "tt1", "no")}
    assert found["k"] == found["v"]
    assert found["c1"] is not None
    assert (found["c1"].film, found["c1"].start, found["c1"].stop) == (1, 2, 5)
    assert found["tt1"] is None  # two films bear it
    assert videos.times(found["c1"]).tolist() == [[0, 10], [10, 20], [20, 30]]


@pytest.fixture(scope="module")
def genre(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """24 films of three classes, LVU files, and an exported folder."""
    folder = tmp_path_factory.mktemp("genre")
    names = [f"f{n:02d}" for n in range(24)]
    classes = {name: n % 3 for n, name in enumerate(names)}
    shards = write_shards(folder / "shards", {name: {} for name in names}, classes=classes)
    splits = {"train": names[:12], "val": names[12:18], "test": [*names[18:], "gone"]}
    lines = {split: [f"{classes.get(name, 0)} x {name} tt" for name in some] for split, some in splits.items()}
    labels = lvu_files(folder / "labels", "genre", lines)
    return SimpleNamespace(shards=shards, labels=labels, model=exported(folder / "model"), names=names)


@pytest.mark.parametrize("mode", ["probe", "finetune"])
def test_the_command_from_an_exported_folder(
    genre: SimpleNamespace, mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(genre.model), str(genre.shards), "--task", "lvu/genre", "--labels", str(genre.labels)]
    words += ["--out", str(tmp_path), "--seeds", "2", "--mode", mode, "--epochs", "4", "--trunk-lr", "1e-3"]
    words += ["--head-lr", "1e-2", "--layers", "1"] if mode == "finetune" else []
    assert main(["evaluate", *words]) == 0
    told = capsys.readouterr()
    assert "found train 12 of 12, val 6 of 6, test 6 of 7, missed gone" in told.err.replace("\n", " ")
    report = json.loads((tmp_path / "results.json").read_text())
    (result,) = report["results"]
    rows = result["rows"]
    assert (report["source"], report["step"], result["n"]) == ("tiny", 7, 6)
    contenders = {"model", "untrained", "constant"} | ({"raw"} if mode == "probe" else set())
    assert set(rows) == contenders
    assert rows["model"]["accuracy"]["mean"] == 1.0
    assert rows["constant"]["accuracy"]["mean"] == pytest.approx(1 / 3)
    text = (tmp_path / "report.md").read_text()
    assert "| lvu/genre | accuracy | 6 | 1 |" in text
    assert "Pretraining left out 2 films, by 9 ids (test.txt" in text
    assert (tmp_path / "tasks.png").read_bytes().startswith(b"\x89PNG")


def test_retrieval_from_an_exported_folder(genre: SimpleNamespace, tmp_path: Path) -> None:
    split = {"train": genre.names[:16], "test": genre.names[16:]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    words = [str(genre.model), str(genre.shards), "--task", "soundtrack", "--labels", str(tmp_path), "--seeds", "1"]
    for mode in ("probe", "finetune"):
        assert main(["evaluate", *words, "--out", str(tmp_path / mode), "--mode", mode, "--epochs", "1"]) == 0
        (result,) = json.loads((tmp_path / mode / "results.json").read_text())["results"]
        assert result["n"] == 8
        assert result["rows"]["chance"]["v2a R@1"]["mean"] == pytest.approx(1 / 8)
        assert "Each query has a gallery of 8." in result["notes"]
        if mode == "probe":
            assert result["rows"]["raw"]["v2a R@1"]["mean"] > 2 / 8


def test_boundaries_leave_each_film_out(genre: SimpleNamespace, tmp_path: Path) -> None:
    for name in genre.names[:4]:
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{n:04d} {int(n in (3, 7))}" for n in range(SHOTS - 1)))
    words = [str(genre.model), str(genre.shards), "--task", "boundaries", "--labels", str(tmp_path), "--seeds", "1"]
    assert main(["evaluate", *words, "--out", str(tmp_path / "out")]) == 0
    (result,) = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert result["n"] == 4
    assert len(result["chosen"]["model"]) == 4
    assert 0 < result["rows"]["constant"]["AP"]["mean"] < 0.3


def test_a_benchmarks_own_file_and_no_rivals(genre: SimpleNamespace, tmp_path: Path) -> None:
    events = [{"label": "kiss", "segment": [20, 40]}]
    database = {
        name: {"subset": subset, "duration": 120, "annotations": events}
        for name, subset in zip(genre.names, ["training"] * 6 + ["validation"] * 2, strict=False)
    }
    (tmp_path / "annotations.json").write_text(json.dumps({"database": database}))
    words = [str(genre.model), str(genre.shards), "--task", "muses", "--labels", str(tmp_path), "--seeds", "1"]
    assert main(["evaluate", *words, "--model-only", "--out", str(tmp_path / "out")]) == 0
    (result,) = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert set(result["rows"]) == {"model", "constant"}
    found = json.loads((tmp_path / "out" / "muses.submission.json").read_text())
    assert found["results"].keys() == set(genre.names[6:8])
    first = found["results"][genre.names[6]][0]
    assert first["label"] == "kiss" and 0 <= first["segment"][0] < first["segment"][1] <= 120


def test_mistakes_are_told(genre: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["evaluate", str(genre.model), str(genre.shards)]
    for words, problem in (
        ([*base, "--task", "lvu/gender", "--labels", str(genre.labels)], "no task lvu/gender"),
        ([*base, "--task", "lvu/genre"], "--task without --labels"),
        ([*base, "--task", "lvu/year", "--labels", str(genre.labels)], "no such file; lvu/year needs"),
        ([*base, "--task", "lvu/genre", "--labels", str(genre.labels), "--step", "3"], "holds one step"),
        ([*base, "--task", "condensed_movies", "--labels", str(tmp_path)], "needs modality text"),
    ):
        assert main(words) == 2
        assert problem in capsys.readouterr().err
    none = lvu_files(tmp_path / "none", "genre", {split: ["0 x zz tt"] for split in ("train", "val", "test")})
    assert main([*base, "--task", "lvu/genre", "--labels", str(none), "--out", str(tmp_path / "o")]) == 2
    assert "too few of its videos" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_ids_of_a_benchmark_become_a_list_to_leave_out(genre: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "ids.txt"
    assert main(["tasks", "ids", "lvu/genre", "--labels", str(genre.labels), "--out", str(out)]) == 0
    assert out.read_text().split() == [*genre.names[12:], "gone"]
    assert {"lvu/genre", "condensed_movies", "moviecuts", "muses", "soundtrack", "boundaries"} < set(TASKS)
