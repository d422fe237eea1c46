"""python -m data_prep shard | lint | preview"""

from __future__ import annotations

import argparse
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.ranks import RankFailed, Ranks, start_ranks
from data_prep.schema import REASONS, SPLITS, BadSample, DataError
from data_prep.sources import Source, all_sources, colour, fraction, positive_int
from data_prep.stop import REQUEUE_EXIT, Stopped, raise_at_signals
from data_prep.storage import location_argument

if TYPE_CHECKING:
    from data_prep.plan import Plan
    from data_prep.sharding import ShardJob, ShardResult

MANUAL = """\
Instruction data -> WebDataset shards that training reads.

  shard     read a source, check every record, write DIR/train and DIR/held_out
  lint      read shards back and list what is bad in them
  preview   show samples as one HTML page

examples:
  python -m data_prep shard --source llava --input chat.json --images images/ --explain
  python -m data_prep shard --source llava --input chat.json --images images/ --output data/chat
  mpirun -n 8 python -m data_prep shard --source hf --input org/dataset --output data/dataset
  python -m data_prep lint data/chat && python -m data_prep preview data/chat

`python -m data_prep COMMAND --help` says more. Exit codes: 0 done; 1 bad data (too many rejects, or lint found
something); 2 the command line or the input needs a change, as the message says; 75 stopped by SIGTERM or SIGUSR1: run
the same command again.
"""

SHARD_MANUAL = """\
Read a source, check every record, and write shards: DIR/train and DIR/held_out hold 000000.tar, 000001.tar, ... and
manifest.json each. Under `mpirun -n N` the work is shared, and the bytes are the same for any N.

Bad records are left out and listed in DIR/rejects.jsonl with file, line or index, id and reason. When there are more
than --max-rejects, nothing else is written. A run that was cut off is taken up by the same command: finished shards
stay. One run at a time may write a DIR. Images are stored byte for byte, unless --convert is given. Unless the source
has a split of its own, --held-out of the samples are held out, by a hash of their images.
"""

LINT_MANUAL = """\
Read every record of the shards back: hashes, sizes and offsets, messages, images to the last pixel, keys. Lists what
is bad, and exits with 1 if anything is.

example: python -m data_prep lint data/chat
"""

PREVIEW_MANUAL = """\
Show samples, evenly spread over the shards, as a contact sheet: one HTML file with the images in it.

example: python -m data_prep preview data/chat --count 100
"""


ANOTHER_RANK_S = 0.5
"""How long a rank other than 0 waits before it says that it stops: a signal to all ranks is then reported once."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["shard"]:
        return _on_all_ranks(arguments[1:])
    args = _parser().parse_args(arguments)
    try:
        return _lint(args.folder) if args.command == "lint" else _preview(args)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = _manual("python -m data_prep", MANUAL)
    commands = parser.add_subparsers(dest="command", required=True, metavar="shard | lint | preview")
    commands.add_parser("shard", add_help=False)
    lint = _manual("lint", LINT_MANUAL, commands)
    lint.add_argument(
        "folder", type=location_argument, metavar="DIR", help="what shard --output wrote, or one shard folder of it"
    )
    preview = _manual("preview", PREVIEW_MANUAL, commands)
    preview.add_argument(
        "folder", type=location_argument, metavar="DIR", help="what shard --output wrote, or one shard folder of it"
    )
    preview.add_argument(
        "--count", type=positive_int, default=48, metavar="N", help="samples of each split (default 48)"
    )
    preview.add_argument("--output", type=Path, metavar="FILE", help="where the page goes (default DIR/preview.html)")
    return parser


def _manual(name: str, text: str, commands: argparse._SubParsersAction | None = None) -> argparse.ArgumentParser:
    make = argparse.ArgumentParser if commands is None else commands.add_parser
    return make(name, description=text, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)


def _shard_parser(chosen: Source | None, sources: dict[str, Source]) -> argparse.ArgumentParser:
    """The parser of `shard`: with the options of the source that was chosen, or with those of all in its help."""
    epilog = "" if chosen else "\n".join(_manual_of(source) for source in sources.values())
    parser = argparse.ArgumentParser(
        "python -m data_prep shard",
        description=SHARD_MANUAL,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--source", required=True, choices=sources, help="where the samples come from; options below")
    parser.add_argument(
        "--output", type=location_argument, metavar="DIR", help="folder or URL to write; needed except with --explain"
    )
    parser.add_argument(
        "--explain", action="store_true", help="print the first three records as they would be stored; write nothing"
    )
    parser.add_argument(
        "--samples-per-shard", type=positive_int, default=1000, metavar="N", help="samples in a tar file (default 1000)"
    )
    parser.add_argument(
        "--held-out", type=fraction, default=0.05, metavar="SHARE",
        help="share of the samples that is held out, where the source has no split of its own (default 0.05)",
    )  # fmt: skip
    parser.add_argument(
        "--max-rejects",
        type=fraction,
        default=0.01,
        metavar="SHARE",
        help="largest share of bad records (default 0.01)",
    )
    parser.add_argument(
        "--repeated-ids", choices=("number", "reject"), default="number",
        help="what happens to a record whose id an earlier one has: it gets ID-2, ID-3, ..., or is rejected "
        "(default number)",
    )  # fmt: skip
    parser.add_argument(
        "--convert", type=colour, nargs="?", const="white", metavar="COLOUR",
        help="write images of more than 8 bits, and transparent ones on this background (default white), as they are "
        "seen; else images stay byte for byte as they are",
    )  # fmt: skip
    parser.add_argument("--limit", type=positive_int, metavar="N", help="read the first N records only (default: all)")
    if chosen:
        group = parser.add_argument_group(f"--source {chosen.name}", chosen.summary)
        chosen.add_options(group)  # type: ignore[arg-type]  # a group declares options as a parser does
    return parser


def _manual_of(source: Source) -> str:
    alone = argparse.ArgumentParser(add_help=False, usage=argparse.SUPPRESS, allow_abbrev=False)
    group = alone.add_argument_group(f"--source {source.name}", source.summary)
    source.add_options(group)  # type: ignore[arg-type]  # as above
    return alone.format_help()


def _on_all_ranks(argv: list[str]) -> int:
    """`shard` on every rank: an error on one rank ends all, and rank 0 alone prints it."""
    ranks = Ranks()
    try:
        sources = all_sources()
        known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        known.add_argument("--source")
        chosen = sources.get(known.parse_known_args(argv)[0].source or "")
        parser = _shard_parser(chosen, sources)
        args = parser.parse_args(argv)
        if args.output is None and not args.explain:
            parser.error("the following arguments are required: --output")
        ranks = start_ranks()
        return _shard(args, _own_options(sources[args.source], argv), sources[args.source], ranks)
    except (DataError, RankFailed) as error:
        if ranks.rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2 if getattr(error, "expected", True) else 1
    except Stopped as stopped:
        if ranks.rank:
            time.sleep(ANOTHER_RANK_S)
        print(f"{stopped}: stopped; finished shards stay, and the same command goes on", file=sys.stderr, flush=True)
        ranks.abort(REQUEUE_EXIT)
        return REQUEUE_EXIT
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with the shards that are missing", file=sys.stderr)
        ranks.abort()
        return 130
    except Exception:
        traceback.print_exc()
        ranks.abort()  # the other ranks do not know and would wait
        raise


def _own_options(source: Source, argv: list[str]) -> argparse.Namespace:
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    source.add_options(own)
    return own.parse_known_args(argv)[0]


def _shard(args: argparse.Namespace, options: argparse.Namespace, source: Source, ranks: Ranks) -> int:
    from data_prep.sharding import ShardJob, shard

    job = ShardJob(
        source, options, args.output, args.samples_per_shard, args.held_out, args.max_rejects, args.limit,
        args.repeated_ids, args.convert,
    )  # fmt: skip
    if args.explain:
        return _explain(job, ranks)
    result = shard(job, ranks)
    if ranks.rank == 0:
        _print_result(args, result)
    return 1 if result.refused else 0


def _explain(job: ShardJob, ranks: Ranks) -> int:
    from data_prep.explain import explain

    if ranks.rank == 0:
        texts = list(explain(job))
        if not texts:
            raise DataError(f"--source {job.source.name}: read 0 records; expected at least one")
        print("\n".join(texts))
    return 0


def _print_result(args: argparse.Namespace, result: ShardResult) -> None:
    from rich.console import Console
    from rich.table import Table

    plan = result.plan
    print(f"{args.source} -> {args.output}")
    table = Table()
    table.add_column("records")
    table.add_column("", justify="right")
    table.add_row("read", f"{plan.read:,}")
    table.add_row("good, not written" if result.refused else "written", f"{plan.accepted:,}")
    for split in SPLITS:
        shards = plan.in_split(split)
        table.add_row(f"  {split}, {len(shards)} shards", f"{sum(len(s.samples) for s in shards):,}")
    table.add_row("rejected", f"{len(plan.rejects):,}")
    for reason, number in plan.reasons():
        table.add_row(f"  {reason}: {REASONS[reason]}", f"{number:,}")
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    if result.refused:
        print(f"error: {_refusal(args, plan)}", file=sys.stderr)
        return
    if plan.repeated:
        print(f"note: {plan.repeated:,} records had the id of an earlier one and were numbered (--repeated-ids)")
    _print_notices(plan.notices(), args.convert)
    if result.shards_kept:
        print(f"{result.shards_kept} of {len(plan.shards)} shards were finished by an earlier run and stayed")
    for split in SPLITS:
        if not plan.in_split(split):
            print(f"note: no sample is in {split}")
    print(f"look at it: python -m data_prep preview {args.output}")


def _print_notices(notices: list[tuple[str, int]], background: str | None) -> None:
    from data_prep.images import CONVERTED, NOTICES

    for name, number in notices:
        if background is None or name not in CONVERTED:
            hint = "; shard --convert writes what is seen" if name in CONVERTED else ""
            print(f"note: {number:,} images are {name} ({NOTICES[name]}){hint}")
        else:
            print(f"note: {number:,} images were {name} and are written as they look on {background}")


def _refusal(args: argparse.Namespace, plan: Plan) -> str:
    reason, number = plan.reasons()[0]
    first = next(reject for reject in plan.rejects if reject.reason == reason)
    hint = " --repeated-ids number keeps these records." if reason == "duplicate_id" else ""
    return (
        f"{len(plan.rejects):,} of {plan.read:,} records are bad, more than --max-rejects {args.max_rejects:g}; the "
        f"commonest reason: {reason} ({number:,}; the first, at {first.location}: {first.detail}). No shard was "
        f"written; see {args.output}/rejects.jsonl, and mend the input or allow a larger share.{hint}"
    )


def _lint(folder: Path) -> int:
    from data_prep.lint import lint, shard_folders

    folders = shard_folders(folder)
    problems, notices = lint(folders)
    for problem in problems:
        print(f"{problem.shard}\t{problem.key or '-'}\t{problem.what}")
    for found in folders:
        print(f"{found.path}: {len(found.shards)} shards, {len(found):,} samples, {found.manifest['bytes']:,} bytes")
    _print_notices(notices, None)
    print(f"{len(problems)} problems" if problems else "all good")
    return 1 if problems else 0


def _preview(args: argparse.Namespace) -> int:
    from data_prep.lint import shard_folders
    from data_prep.preview import preview

    output = args.output or args.folder / "preview.html"
    try:
        shown = preview(shard_folders(args.folder), args.count, output)
    except BadSample as bad:
        raise DataError(f"{bad}; python -m data_prep lint {args.folder} lists all that is bad") from None
    print(f"{shown} samples: {output}")
    return 0


def run() -> int:
    """The program: `python -m data_prep`, or vlsi-data."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... | head` is no error
    if sys.argv[1:2] == ["shard"]:
        raise_at_signals()
    return main()


if __name__ == "__main__":
    sys.exit(run())
