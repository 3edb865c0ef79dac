"""`lmp data inspect`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lmp.errors import EXIT_DONE, UserError


def register(data: Any) -> None:
    """Add the command to the subparsers of `lmp data`."""
    inspect = data.add_parser("inspect", help="a film shot by shot, as a table and a contact sheet")
    inspect.add_argument("shards", nargs="+", metavar="SHARDS", help="folders or URLs of shards")
    inspect.add_argument("--film", metavar="KEY", help="the film (without it all films, with what is odd in them)")
    inspect.add_argument(
        "--films", metavar="FILMS", help="the film itself, or the folder, tar or list that it was ingested from"
    )
    inspect.add_argument("--subtitles", type=Path, help="a folder of subtitles (default: beside the film)")
    inspect.add_argument("--first", type=int, default=0, metavar="SHOT", help="begin with this shot")
    inspect.add_argument("-n", dest="shots", type=int, help="so many shots (default: all)")
    inspect.add_argument("--out", type=Path, metavar="FILE.png", help="draw the shots, or without --films the features")
    inspect.set_defaults(run=_inspect)


def _inspect(arguments: argparse.Namespace) -> int:
    from lmp.data import head, inspect_film, inspect_sheet
    from lmp.data.index import FilmIndex

    if arguments.shots is not None and arguments.shots < 1:
        raise UserError(f"-n {arguments.shots} shows nothing", remedy="give at least 1")
    if arguments.subtitles is not None and arguments.films is None:
        raise UserError("--subtitles are those of the film itself", remedy="give --films too")
    if arguments.out is not None and (arguments.out.suffix != ".png" or not arguments.out.parent.is_dir()):
        raise UserError(f"--out {arguments.out} cannot be written", remedy="give a FILE.png in a folder that is there")
    index = FilmIndex.load(arguments.shards)
    key = arguments.film or (index.keys[0] if len(index) == 1 else None)
    if key is None:
        if arguments.out or arguments.films or arguments.first or arguments.shots:
            raise UserError(f"there are {len(index)} films", remedy="say which by --film KEY")
        head.show(inspect_film.overview(index, index.keys))
        return EXIT_DONE
    number = head.film_of(index, key)
    found = inspect_film.inspect_film(index, number, first=arguments.first, count=arguments.shots)
    seen, written = None, []
    if arguments.films is not None:
        with inspect_film.film_at_hand(found, arguments.films, arguments.subtitles) as (film, subtitles):
            seen = inspect_film.listen(found, film, subtitles)
            pictures = inspect_film.look(found, film)
            if arguments.out is not None:
                written = inspect_sheet.shot_pages(found, seen, pictures, arguments.out)
            else:
                for _ in pictures:  # which marks the black ones
                    pass
    elif arguments.out is not None:
        inspect_sheet.features_page(found, arguments.out)
        written = [arguments.out]
    print("\n".join([*inspect_film.facts(found), *(seen.notes if seen else [])]))
    head.show(inspect_film.table(found, seen))
    for path in written:
        print(f"drawn: {path}")
    return EXIT_DONE
