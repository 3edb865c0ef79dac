"""`lmp ingest`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmp.errors import EXIT_DONE, EXIT_USER, UserError

if TYPE_CHECKING:
    from lmp.films.ingest import IngestReport


def register(commands: Any) -> None:
    """Add `lmp ingest` to the subparsers of `lmp`."""
    ingest = commands.add_parser("ingest", help="films become shards of features")
    add_options(ingest)
    ingest.set_defaults(run=_ingest)


def add_options(ingest: argparse.ArgumentParser) -> None:
    """Add the films and the options of an ingest."""
    ingest.add_argument(
        "films",
        nargs="+",
        metavar="FILM",
        help="films, folders, tars of video2dataset, or lists (.csv, .parquet, .txt); local or URLs",
    )
    ingest.add_argument("--out", type=Path, required=True, metavar="SHARDS")
    ingest.add_argument(
        "--encoder",
        action="append",
        default=[],
        metavar="NAME=SPEC",
        help="modality and its encoders: video=signal, text=/folder/of/a/model, audio=vggish:FILE+wav2vec2:FOLDER",
    )
    ingest.add_argument("--shots", type=Path, help="a shot list, or a folder with one per film")
    ingest.add_argument(
        "--detector",
        metavar="SPEC",
        help="what finds the shots: layout (default), adaptive, content, hash, hist, threshold, transnetv2:WEIGHTS; "
        "with options: adaptive:adaptive_threshold=3.0",
    )
    ingest.add_argument("--min-shot", type=float, metavar="S", help="shots found that are shorter are merged (0.5)")
    ingest.add_argument("--subtitles", type=Path, help="a folder of subtitles (default: beside each film)")
    ingest.add_argument(
        "--speech", metavar="SPEC", help="hears films without subtitles: whisper:FOLDER, whisper:FOLDER,language=en"
    )
    ingest.add_argument(
        "--leave-out", action="append", default=[], type=Path, metavar="FILE", help="ids of films to refuse, one a line"
    )
    ingest.add_argument("--workers", type=int, default=1)
    ingest.add_argument("--device", default="cpu", help="where the networks run, such as cuda")
    ingest.add_argument("--overwrite", action="store_true")


def encoders_of(specs: list[str]) -> dict[str, str]:
    """Modality -> base encoder, from the values of --encoder; the signal encoders where there are none.

    Raises:
        UserError: one that is not NAME=SPEC.
    """
    encoders = {}
    for spec in specs or ["video=signal", "audio=signal", "text=signal"]:
        name, equals, value = spec.partition("=")
        if not (equals and name and value):
            raise UserError(f"--encoder {spec}: is not NAME=SPEC", remedy="write for example --encoder video=signal")
        encoders[name] = value
    return encoders


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the options say of how films become features, as arguments of `lmp.films.ingest.ingest`.

    Raises:
        UserError: options that contradict each other, or an --encoder that is not NAME=SPEC.
    """
    finding = {"detector": arguments.detector, "min_shot_s": arguments.min_shot}
    finding = {name: value for name, value in finding.items() if value is not None}
    if arguments.shots is not None and finding:
        raise UserError("--shots gives the shots, --detector and --min-shot find them", remedy="leave one of them out")
    return {
        "encoders": encoders_of(arguments.encoder),
        "shot_lists": arguments.shots,
        **finding,
        "subtitles": arguments.subtitles,
        "speech": arguments.speech,
        "device": arguments.device,
    }


def tell(report: IngestReport, out: Path) -> int:
    """Print what came of an ingest; returns the exit code."""
    for film in report.refused:
        print(f"refused {film}: it is on the list of films to leave out")
    print(f"{report.films} films, {report.shots} shots" + (f" -> {out}" if report.films else ""))
    for name, counts in sorted(report.quality.items()):
        print(f"{name}: " + ", ".join(f"{count} {what}" for what, count in sorted(counts.items())))
    for film, problem, remedy in report.failures:
        print(f"error: skipped {film}: {problem} -> {remedy}", file=sys.stderr)
    return EXIT_USER if report.failures else EXIT_DONE


def _ingest(arguments: argparse.Namespace) -> int:
    from lmp.data.leave_out import LeaveOut

    try:
        from lmp.films.ingest import ingest
    except ImportError as error:
        raise UserError(f"{error.name} is not installed", remedy="pip install 'lmp[films]'") from error

    report = ingest(
        arguments.films,
        arguments.out,
        **settings_of(arguments),
        workers=arguments.workers,
        overwrite=arguments.overwrite,
        leave_out=LeaveOut.read(arguments.leave_out),
    )
    return tell(report, arguments.out)
