"""`lmp data ...`: looking at shards, mending them, and making them from what others wrote."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmp.data import commands_import, commands_inspect
from lmp.data.progress import bytes_bar
from lmp.errors import EXIT_DONE, UserError

if TYPE_CHECKING:
    from lmp.data.index import FilmIndex
    from lmp.data.manifest import Manifest
    from lmp.data.quarantine import Change

_NAMED = 5


def register(data: Any) -> None:
    """Add the commands to the subparsers of `lmp data`."""
    _verify_command(data)
    _quarantine_command(data)
    _stats_command(data)
    _head_command(data)
    commands_inspect.register(data)
    _split_command(data)
    _reshard_command(data)
    commands_import.register(data)


def _verify_command(data: Any) -> None:
    verify = data.add_parser("verify", help="read everything and name what is damaged")
    verify.add_argument("shards", nargs="+", metavar="SHARDS", help="folders or URLs of shards")
    verify.add_argument("--json", action="store_true", help="print the faults as JSON")
    verify.set_defaults(run=_verify)


def _verify(arguments: argparse.Namespace) -> int:
    from lmp.data.index import FilmIndex
    from lmp.data.verify import bytes_to_read, unhashed, verify

    index = FilmIndex.load(arguments.shards, check_sizes=False)
    with bytes_bar("verifying", bytes_to_read(index)) as progress:
        faults = list(verify(index, progress=progress))
    if arguments.json:
        listed = [
            {
                "shard": index.shards[fault.shard],
                "film": None if fault.film is None else index.keys[fault.film],
                "column": fault.column,
                "problem": fault.what,
            }
            for fault in faults
        ]
        print(json.dumps(listed, indent=1))
    else:
        for fault in faults:
            print(fault)
    for line in unhashed(index):
        print(line, file=sys.stderr if arguments.json else sys.stdout)
    if faults:
        more = f"; and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
        raise UserError(
            "; ".join(map(str, faults[:_NAMED])) + more,
            remedy="copy the shard again from its source, or take those films out with `lmp data quarantine`",
        )
    if not arguments.json:
        print(f"{len(index)} films, {int(index.shots.sum())} shots: no damage, digest {index.digest}")
    return EXIT_DONE


def _quarantine_command(data: Any) -> None:
    quarantine = data.add_parser("quarantine", help="take films out of a folder, or back in, by a new manifest")
    quarantine.add_argument("folder", metavar="FOLDER", help="a local folder of shards")
    what = quarantine.add_mutually_exclusive_group(required=True)
    what.add_argument("--film", action="append", metavar="KEY", help="take this film out")
    what.add_argument("--damaged", action="store_true", help="take out the films that verify finds damaged")
    what.add_argument("--release", action="append", metavar="KEY", help="take this film in again")
    quarantine.add_argument("--reason", metavar="TEXT", help="why (default with --damaged: what was found)")
    quarantine.set_defaults(run=_quarantine)


def _quarantine(arguments: argparse.Namespace) -> int:
    from lmp.data.quarantine import quarantine, quarantine_damaged, release

    folder = arguments.folder
    if arguments.release and arguments.reason:
        raise UserError("--reason says why films are taken out", remedy="leave it out with --release")
    with bytes_bar("verifying", _bytes_held(folder) if arguments.damaged else None) as progress:
        if arguments.film:
            reasons = dict.fromkeys(arguments.film, arguments.reason or "no reason given")
            change = quarantine(folder, reasons, progress=progress)
        elif arguments.release:
            change = release(folder, arguments.release, progress=progress)
        else:
            change, faults = quarantine_damaged(folder, reason=arguments.reason, progress=progress)
            for fault in faults:
                print(fault)
    _print_change(change)
    return EXIT_DONE


def _print_change(change: Change) -> None:
    for label, keys in (("quarantined", change.taken), ("released", change.released)):
        if keys:
            print(f"{len(keys)} films {label}: {', '.join(keys)}")
    for name in change.renewed:
        print(f"{name}: its size and sha256 in the manifest are now those of the file")
    if change.backup is None:
        print(f"no damage, nothing to do, digest {change.digest}")
        return
    print(f"digest {change.digest}; it was {change.before}, kept as {change.backup}")
    print("a run on this data has to be stopped; it goes on with --new-data, and is refused without")


def _bytes_held(folder: str) -> int | None:
    """What a whole verification reads; None if there is nothing to tell from."""
    from lmp.data.index import FilmIndex
    from lmp.data.verify import bytes_to_read

    try:
        return bytes_to_read(FilmIndex.load(folder, check_sizes=False))
    except UserError:
        return None


def _stats_command(data: Any) -> None:
    stats = data.add_parser("stats", help="films, lengths, modalities, packing")
    stats.add_argument("shards", nargs="+", metavar="SHARDS", help="folders or URLs of shards")
    stats.add_argument("--pack-shots", type=int, metavar="P", help="how an epoch of packs of P shots is filled")
    stats.add_argument("--plot", type=Path, metavar="FILE.png", help="draw lengths and valid fractions")
    stats.add_argument("--json", action="store_true")
    stats.set_defaults(run=_stats)


def _stats(arguments: argparse.Namespace) -> int:
    from lmp.data import stats
    from lmp.data.index import FilmIndex

    index = FilmIndex.load(arguments.shards)
    with bytes_bar("reading", stats.bytes_to_read(index)) as progress:
        found = stats.stats(index, pack_shots=arguments.pack_shots, progress=progress)
    if arguments.plot is not None:
        stats.plot(index, found, arguments.plot)
    print(json.dumps(found, indent=1, ensure_ascii=False) if arguments.json else "\n".join(stats.lines(found)))
    return EXIT_DONE


def _head_command(data: Any) -> None:
    head = data.add_parser("head", help="the first films, or one film's shots")
    head.add_argument("shards", nargs="+", metavar="SHARDS", help="folders or URLs of shards")
    head.add_argument("-n", dest="rows", type=int, help="rows (default: 5 films; of --film all shots)")
    head.add_argument("--film", metavar="KEY", help="show this film's shots")
    head.set_defaults(run=_head)


def _head(arguments: argparse.Namespace) -> int:
    from lmp.data import head
    from lmp.data.index import FilmIndex

    if arguments.rows is not None and arguments.rows < 1:
        raise UserError(f"-n {arguments.rows} shows nothing", remedy="give at least 1")
    index = FilmIndex.load(arguments.shards)
    if arguments.film is None:
        head.show(head.films_table(index, arguments.rows or 5))
    else:
        head.show(head.shots_table(index, arguments.film, arguments.rows))
    return EXIT_DONE


def _split_command(data: Any) -> None:
    split = data.add_parser("split", help="deal films to parts, each in a folder of its own")
    _add_rewriting(split)
    how = split.add_mutually_exclusive_group(required=True)
    how.add_argument("--parts", nargs="+", metavar="NAME=SHARE", help="by a hash of the key: train=0.9 val=0.1")
    how.add_argument("--list", nargs="+", metavar="NAME=FILE", help="by files that list keys, one a line")
    how.add_argument("--field", metavar="FIELD", help="by what this field of each film's record says, as `split`")
    split.add_argument("--group", metavar="FIELD", help="with --parts: films with the same FIELD stay together")
    split.add_argument("--seed", type=int, help="with --parts: another one, another deal (default: 0)")
    split.set_defaults(run=_split)


def _split(arguments: argparse.Namespace) -> int:
    from lmp.data import rewrite
    from lmp.data.index import FilmIndex

    if arguments.parts is None and (arguments.group is not None or arguments.seed is not None):
        raise UserError("--group and --seed belong to --parts", remedy="leave them out")
    index = FilmIndex.load(arguments.shards)
    if arguments.parts:
        shares = {name: _share(name, text) for name, text in _pairs("--parts", arguments.parts).items()}
        parts = rewrite.parts_by_share(index, shares, group=arguments.group, seed=arguments.seed or 0)
    elif arguments.list:
        lists = {name: Path(text) for name, text in _pairs("--list", arguments.list).items()}
        parts = rewrite.parts_by_list(index, lists)
    else:
        parts = rewrite.parts_by_field(index, arguments.field)
    with bytes_bar("splitting", rewrite.bytes_of_films(index)) as progress:
        manifests = rewrite.split(
            index, arguments.out, parts, films_per_shard=arguments.films_per_shard, progress=progress
        )
    for name, manifest in manifests.items():
        _print_written(f"{arguments.out}/{name}", manifest)
    _print_left_out(index)
    return EXIT_DONE


def _reshard_command(data: Any) -> None:
    reshard = data.add_parser("reshard", help="merge folders and cut them into other shards")
    _add_rewriting(reshard)
    reshard.add_argument("--shuffle", type=int, metavar="SEED", help="in another order")
    reshard.set_defaults(run=_reshard)


def _reshard(arguments: argparse.Namespace) -> int:
    from lmp.data import rewrite
    from lmp.data.index import FilmIndex

    index = FilmIndex.load(arguments.shards)
    with bytes_bar("resharding", rewrite.bytes_of_films(index)) as progress:
        manifest = rewrite.reshard(
            index,
            arguments.out,
            films_per_shard=arguments.films_per_shard,
            shuffle=arguments.shuffle,
            progress=progress,
        )
    _print_written(arguments.out, manifest)
    _print_left_out(index)
    return EXIT_DONE


def _add_rewriting(command: argparse.ArgumentParser) -> None:
    command.add_argument("shards", nargs="+", metavar="SHARDS", help="folders or URLs of shards")
    command.add_argument("--out", required=True, metavar="FOLDER", help="a local folder, made if absent")
    command.add_argument("--films-per-shard", type=int, default=64, metavar="N")


def _print_written(folder: str, manifest: Manifest) -> None:
    print(
        f"{folder}: {manifest['films']} films, {manifest['shots']} shots in {len(manifest['shards'])} shards, "
        f"digest {manifest['digest']}"
    )


def _print_left_out(index: FilmIndex) -> None:
    if count := sum(len(manifest["quarantined"]) for manifest in index.manifests):
        print(f"{count} quarantined films left out")


def _pairs(option: str, words: list[str]) -> dict[str, str]:
    """NAME=TEXT words as a dict."""
    pairs: dict[str, str] = {}
    for word in words:
        name, _, text = word.partition("=")
        if not name or not text or name in pairs:
            raise UserError(
                f"{option} {word} is not NAME=... with a name of its own", remedy="write NAME=... once each"
            )
        pairs[name] = text
    return pairs


def _share(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"--parts {name}={text}: {text} is no number", remedy="write for example train=0.9") from error
