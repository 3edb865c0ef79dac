"""Where films come from: files, folders, lists, tars of video2dataset; local, or any URL that fsspec reaches."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from lmp.data.record import WRITER_FIELDS
from lmp.data.storage import MISSING, Range, ReadError, files_at, is_url, join, normal
from lmp.data.tar import Sample, Tar
from lmp.errors import UserError
from lmp.films.shots import find_shot_list
from lmp.films.subtitles import SUFFIXES as SUBTITLE_SUFFIXES
from lmp.films.subtitles import find_subtitles

_NAMES = "avi flv m2ts m4v mkv mov mp4 mpeg mpg mts ogv ts vob webm wmv"
FILM_SUFFIXES = frozenset(f".{name}" for name in _NAMES.split())
LIST_SUFFIXES = (".csv", ".parquet", ".txt")
_FILM_COLUMNS, _KEY_COLUMNS = ("path", "url"), ("key", "id")
_PIECE, _PIECES = 1 << 23, 4  # bytes of a range, and ranges asked for at once, when a file is copied
_AGAIN = "check the path, or copy or download the file again"


@dataclass(frozen=True)
class Source:
    """A file, or a member of a tar.

    Attributes:
        location: of the file or the tar; a local path or a URL.
        name: of the file or the member, without folders.
        offset, size: of the member's bytes in the tar; size is None for a whole file.
    """

    location: str
    name: str
    offset: int = 0
    size: int | None = None

    @classmethod
    def of(cls, location: str | Path) -> Source:
        """A whole file."""
        location = normal(location)
        return cls(location, _plain_path(location).name)

    def __str__(self) -> str:
        return self.location if self.size is None else f"{self.location}, member {self.name}"

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return Path(self.name).stem

    def state(self) -> list[Any]:
        """What changes with the file, as JSON.

        Raises:
            UserError: it is not there, or cannot be asked for.
        """
        if is_url(self.location):
            version = _remote(self.location).version(self.location)
            if version is None:
                raise UserError(f"{self}: {MISSING}", remedy=_AGAIN)
            return [self.location, version, self.offset, self.size]
        try:
            facts = Path(self.location).stat()
        except OSError as error:
            raise UserError(f"there is no {self}", remedy="check the path") from error
        return [str(Path(self.location).resolve()), facts.st_size, facts.st_mtime_ns, self.offset, self.size]

    @property
    def is_local(self) -> bool:
        """Whether it can be opened where it lies."""
        return self.size is None and not is_url(self.location)

    def copy_into(self, folder: Path) -> Path:
        """A copy; what video2dataset keeps of subtitles in KEY.json becomes KEY.vtt.

        Raises:
            UserError: it cannot be read in full, or the folder is full.
        """
        path = folder / self.name
        try:
            with path.open("xb") as file:
                for piece in self._pieces():
                    file.write(piece)
            if path.suffix == ".json":
                told = json.loads(path.read_bytes())
                path = path.with_suffix(".vtt")
                path.write_text(_webvtt(_spoken(told)), encoding="utf-8")
        except OSError as error:
            remedy = "let TMPDIR name a local folder with room for one film for each worker"
            raise UserError(f"{self} cannot be copied to {folder}: {error.strerror}", remedy=remedy) from error
        return path

    def _pieces(self) -> Iterator[memoryview]:
        files = files_at(self.location)
        size = self.size
        if size is None:
            (size,) = files.sizes([self.location])
            if size is None:
                raise UserError(f"{self}: {MISSING}", remedy=_AGAIN)
        for start in range(0, size, _PIECE * _PIECES):
            held = memoryview(bytearray(min(_PIECE * _PIECES, size - start)))
            ranges = [
                Range(self.location, self.offset + start + at, held[at : at + _PIECE])
                for at in range(0, len(held), _PIECE)
            ]
            try:
                files.read(ranges)
            except ReadError as error:
                raise UserError(f"{self}: {error.problem}", remedy=error.remedy or _AGAIN) from error
            yield held


@dataclass(frozen=True)
class Film:
    """A film to be read, and what is known of it.

    Attributes:
        key: its key in the shards.
        file: the film.
        info: goes into its record; what is found in the film itself wins.
        shots, subtitles: given for it.
        alone: nothing is to be looked for beside it.
    """

    key: str
    file: Source
    info: Mapping[str, Any] = field(default_factory=dict)
    shots: Source | None = None
    subtitles: Source | None = None
    alone: bool = False

    def __str__(self) -> str:
        return str(self.file)

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Film:
        """The inverse of dataclasses.asdict."""
        sources = {
            name: None if told[name] is None else Source(**told[name]) for name in ("file", "shots", "subtitles")
        }
        return cls(**{**told, **sources})

    def shots_in(self, lists: Path | None) -> Source | None:
        """Its shot list: its own, or the one in a folder of lists, or `lists` itself; None: to be found.

        Raises:
            UserError: the folder has none for it.
        """
        if self.shots is not None or lists is None:
            return self.shots
        return Source.of(find_shot_list(lists, Path(self.file.name)) if lists.is_dir() else lists)

    def subtitles_in(self, folder: Path | None) -> Source | None:
        """Its subtitles: its own, or those of a folder, or without one those beside it; None: it has none."""
        if self.subtitles is not None:
            return self.subtitles
        if folder is not None:
            found = find_subtitles(folder / self.file.name)
        elif self.alone or self.file.size is not None:
            return None
        elif is_url(self.file.location):
            return _remote_subtitles(self.file.location)
        else:
            found = find_subtitles(Path(self.file.location))
        return None if found is None else Source.of(found)


class Found(NamedTuple):
    """Films, in order of what was given, and what could not be used: its place, what is wrong, what to do."""

    films: list[Film]
    failures: list[tuple[str, str, str]]


def check_keys(films: Iterable[Film]) -> None:
    """Raise UserError if two films have the same key."""
    seen: dict[str, Film] = {}
    for film in films:
        if (other := seen.setdefault(film.key, film)) is not film:
            raise UserError(
                f"{other} and {film} would share the key {film.key}",
                remedy="rename one, or give a list with a column `key`",
            )


@contextmanager
def brought(
    film: Source, shots: Source | None = None, subtitles: Source | None = None
) -> Iterator[tuple[Path, Path | None, Path | None]]:
    """Local paths of these files. Copies of those that are not local lie in a scratch folder (TMPDIR), and go.

    Raises:
        UserError: one that cannot be read; errors within, which name the source in place of the copy.
    """
    with ExitStack() as stack:
        copies: dict[str, Source] = {}

        def path_of(source: Source) -> Path:
            if source.is_local:
                return Path(source.location)
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="lmp-film-"))
            path = source.copy_into(Path(scratch))
            copies[str(path)] = source
            return path

        try:
            yield (
                path_of(film),
                None if shots is None else path_of(shots),
                None if subtitles is None else path_of(subtitles),
            )
        except UserError as error:
            problem = error.problem
            for copy, source in copies.items():
                problem = problem.replace(copy, str(source))
            raise UserError(problem, remedy=error.remedy) from error


def expand(sources: Iterable[str | Path | Film]) -> Found:
    """The films that are meant.

    Args:
        sources: a film; a folder, of which films and tars are taken by name; a tar of video2dataset; a list, of films
            as .csv or .parquet (see `_from_table`), or of anything else here as .txt, one a line. Local or a URL.

    Raises:
        UserError: one that is not there, a folder or list without films, a list without the column that it needs.
    """
    found = Found([], [])
    for source in sources:
        if isinstance(source, Film):
            found.films.append(source)
        else:
            _add(found, normal(source))
    if not found.films and not found.failures:
        raise UserError("no films were given", remedy="name films, or folders of films")
    return found


def key_of(name: str | Path) -> str:
    """The key of a film: the stem of its name in plain letters, digits, _ and -, at most 80 of them."""
    return _plain_key(Path(name).stem)


def _plain_key(text: str) -> str:
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    key = re.sub(r"[^A-Za-z0-9_-]+", "-", plain)
    if re.search("[A-Za-z0-9]", key) and len(key) <= 80:
        return key
    # Nothing readable is left, or too much: the digest keeps names apart.
    return f"{key[:60] if len(key) > 80 else 'film'}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def _add(found: Found, location: str, *, listed: str | None = None) -> None:
    """Add what a location stands for; `listed`: the list that names it."""
    suffix = _plain_path(location).suffix.lower()
    if is_url(location):
        folder = suffix not in (*FILM_SUFFIXES, *LIST_SUFFIXES, ".tar")
    else:
        folder = Path(location).is_dir()
        if listed is None and not Path(location).exists():
            raise UserError(f"there is no film {location}", remedy="check the path")
    if folder:
        _add_folder(found, location)
    elif suffix == ".tar":
        _add_tar(found, location)
    elif suffix not in LIST_SUFFIXES:
        film = Source.of(location)
        found.films.append(Film(key_of(film.name), film))
    elif listed is not None:
        raise UserError(f"{listed} names another list, {location}", remedy="give both lists to the command")
    elif suffix == ".txt":
        _add_lines(found, location)
    else:
        found.films.extend(_from_table(location))


def _add_folder(found: Found, folder: str) -> None:
    names = _remote(folder).names(folder) if is_url(folder) else sorted(path.name for path in Path(folder).iterdir())
    wanted = [n for n in names if Path(n).suffix.lower() in (*FILM_SUFFIXES, ".tar") and not n.startswith(".")]
    if not wanted:
        raise UserError(f"{folder} holds no film", remedy=f"give films ({', '.join(sorted(FILM_SUFFIXES))}), or tars")
    for name in wanted:
        _add(found, join(folder, name))


def _add_lines(found: Found, location: str) -> None:
    """A list of one a line. Blank lines, and those that begin with `# `, are skipped."""
    lines = [line.strip() for line in _text(location).splitlines()]
    wanted = [line for line in lines if line and not line.startswith("# ")]
    if not wanted:
        raise UserError(f"{location} names no film", remedy="write one path or URL on each line")
    for line in wanted:
        _add(found, _relative(line, location), listed=location)


def _add_tar(found: Found, location: str) -> None:
    """A tar of video2dataset: KEY.mp4, and KEY.json, KEY.txt, KEY.srt where there are. Damage costs what it hits."""
    last = "none"
    try:
        with Tar(location if is_url(location) else Path(location)) as tar:
            for sample in tar.samples():
                last = sample.key
                try:
                    found.films.append(_from_sample(tar, sample, location))
                except UserError as error:
                    found.failures.append((f"{location}, sample {sample.key}", error.problem, error.remedy))
    except UserError as error:  # of the tar itself: what came before is whole
        found.failures.append((location, f"{error.problem}; the last sample taken is {last}", error.remedy))


def _from_sample(tar: Tar, sample: Sample, location: str) -> Film:
    place = f"{location}, sample {sample.key}"
    told = tar.record(sample, place) or {}

    def source(suffixes: Iterable[str]) -> Source | None:
        for extension, member in sample.members.items():
            if (suffix := f".{extension.lower()}") in suffixes:
                return Source(location, PurePosixPath(sample.key).name + suffix, member.offset, member.size)
        return None

    if (film := source(FILM_SUFFIXES)) is None:
        why = told.get("error_message") or told.get("status")
        raise UserError(f"{place}: holds no film" + (f": {why}" if why else ""), remedy="download it again")
    subtitles = source(SUBTITLE_SUFFIXES) or (source([".json"]) if _spoken(told) else None)
    if (member := sample.members.get("txt")) is not None and not told.get("caption"):
        told["caption"] = tar.read(member.offset, member.size).decode("utf-8", "replace").strip()
    if isinstance(more := told.get("yt_meta_dict"), dict):
        told["yt_meta_dict"] = {name: value for name, value in more.items() if name != "subtitles"}
    return Film(key_of(film.name), film, _info(told), subtitles=subtitles, alone=True)


def _spoken(told: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The subtitles in KEY.json, in the language that comes first. Those of clips count from the start of the video."""
    more = told.get("yt_meta_dict")
    languages = more.get("subtitles") if isinstance(more, dict) and "clips" not in told else None
    return next(iter(languages.values()), []) if isinstance(languages, dict) else []


def _webvtt(lines: Iterable[Mapping[str, Any]]) -> str:
    try:
        cues = ["\n".join([f"{line['start']} --> {line['end']}", *line["lines"]]) for line in lines]
    except (KeyError, TypeError) as error:
        problem = f"its subtitles (yt_meta_dict) are not lists of start, end and lines: {error!r}"
        raise UserError(problem, remedy="write the tar again, or take them out") from error
    return "\n\n".join(["WEBVTT", *cues]) + "\n"


def _from_table(location: str) -> Iterator[Film]:
    """The films of a list with columns: path or url; key or id; subtitles; shots. Other columns go into the records.

    Paths are relative to the list. A column `subtitles` tells all there are: with an empty cell nothing is looked for.
    """
    columns, rows = _csv(location) if location.lower().endswith(".csv") else _parquet(location)
    film_column = next((name for name in _FILM_COLUMNS if name in columns), None)
    if film_column is None:
        raise UserError(
            f"{location} has no column {' or '.join(_FILM_COLUMNS)}; it has {', '.join(columns)}",
            remedy="name the column that holds the films path or url",
        )
    key_column = next((name for name in _KEY_COLUMNS if name in columns), None)

    def source(row: Mapping[str, Any], column: str) -> Source | None:
        cell = row.get(column)
        return None if cell in (None, "") else Source.of(_relative(str(cell), location))

    count = 0
    for count, row in enumerate(rows, 1):
        film = source(row, film_column)
        if film is None:
            raise UserError(f"{location}, row {count}: {film_column} is empty", remedy="name the film, or leave it out")
        key = row.get(key_column) if key_column else None
        used = {film_column, key_column, "subtitles", "shots"}
        yield Film(
            key=key_of(film.name) if key in (None, "") else _plain_key(str(key)),
            file=film,
            info=_info({name: value for name, value in row.items() if name not in used}),
            shots=source(row, "shots"),
            subtitles=source(row, "subtitles"),
            alone="subtitles" in columns,
        )
    if count == 0:
        raise UserError(f"{location} names no film", remedy="give a list with a row for each film")


def _csv(location: str) -> tuple[list[str], Iterator[dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(_text(location), newline=""))

    def rows() -> Iterator[dict[str, Any]]:
        for number, row in enumerate(reader, 1):
            if None in row:
                raise UserError(
                    f"{location}, row {number} has more cells than the list has columns",
                    remedy='put cells that hold a comma between quotes: "a, b"',
                )
            yield row

    return list(reader.fieldnames or []), rows()


def _parquet(location: str) -> tuple[list[str], Iterator[dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError("pyarrow is not installed", remedy="pip install 'lmp[features]'") from error
    try:
        table = parquet.ParquetFile(io.BytesIO(_contents(location)))
    except pyarrow.ArrowException as error:
        raise UserError(f"{location} is no parquet file: {error}", remedy="write the list again") from error
    rows = (row for batch in table.iter_batches() for row in batch.to_pylist())
    return list(table.schema_arrow.names), rows


def _info(told: Mapping[str, Any]) -> dict[str, Any]:
    """What of these facts a record can hold: as JSON, without empty ones and those that the writer of shards makes."""
    plain = {str(name): _plain(value) for name, value in told.items() if name not in WRITER_FIELDS}
    return {name: value for name, value in plain.items() if value not in (None, "")}


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value)  # a date, a decimal number


def _relative(path: str, location: str) -> str:
    """A path in a list, which is relative to the list."""
    path = normal(path.strip())
    if is_url(path) or Path(path).is_absolute():
        return path
    return join(location.rpartition("/")[0] if is_url(location) else str(Path(location).parent), path)


def _contents(location: str) -> bytes:
    (data,) = files_at(location).contents([location])
    if data is None:
        raise UserError(f"there is no list {location}", remedy="check the path")
    return data


def _text(location: str) -> str:
    try:
        return _contents(location).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{location} is not text in UTF-8: {error}", remedy="write the list as UTF-8") from error


def _remote_subtitles(location: str) -> Source | None:
    """The subtitles beside a film that a URL names."""
    if "?" in location:  # what else lies there is not known
        return None
    wanted = [location.rpartition(".")[0] + suffix for suffix in SUBTITLE_SUFFIXES]
    sizes = files_at(location).sizes(wanted)
    return next((Source.of(path) for path, size in zip(wanted, sizes, strict=True) if size is not None), None)


def _remote(location: str) -> Any:
    """The storage of a URL, a lmp.data.remote.RemoteFiles."""
    return files_at(location)


def _plain_path(location: str) -> PurePosixPath:
    """The path of a location, without the query of a URL."""
    return PurePosixPath(location.partition("?")[0] if is_url(location) else location)
