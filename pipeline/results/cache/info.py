"""`python -m pipeline cache-info`: the identity, progress, size and fidelity of a teacher cache."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data_prep.shards import MANIFEST
from data_prep.storage import listed
from pipeline.cache.layout import CacheIdentity
from pipeline.cache.mapping import MAPPING, VOCABULARY
from pipeline.cache.paths import IDENTITY, newest
from pipeline.errors import CacheError
from pipeline.loss.bucket import BucketShare
from pipeline.loss.fidelity import Fidelity
from pipeline.results.cache.on_disk import CacheOnDisk, find_caches, inspect_cache, owner_of
from pipeline.results.status import size_of
from pipeline.runtime.display.progress import size_text
from pipeline.runtime.folder import read_metrics

MEASURES = ("entropy", "mass", "kl_bias", "kl_rms", "gradient_error")
"""Fidelity measures of a layer, in the column order of the table."""

SHOWN_PROBLEMS = 8
"""Number of missing or damaged shards that are listed with a reason; --verify lists all."""


def run(
    path: Path,
    check: bool,
    sample: str | None,
    tokenizer: Path | None,
    suspects: bool = False,
    limit: int | None = None,
    output: Path | None = None,
) -> None:
    """Print the state of a cache, the top tokens of one `sample`, or `suspects`; with `check`, also verify all files.

    Raises CacheError: options contradict, there is no cache, there are several, or `check` found a problem.
    """
    _check_options(sample, tokenizer, suspects, limit, output)
    folders = find_caches(path)
    owner = owner_of(path)
    if len(folders) > 1:
        _show_list(folders, owner)
        latest = newest(folders[0].parent) or folders[-1]
        raise CacheError(
            f"{len(folders)} caches in {path}: name one. The one begun last: "
            f"python -m pipeline cache-info {shlex.quote(str(latest))}"
        )
    cache = inspect_cache(folders[0], owner)
    if suspects:
        from pipeline.results.cache import suspects as ranking

        ranking.run(cache, limit, output)
    elif sample is None:
        show(cache)
    else:
        from pipeline.results.cache import top_tokens  # imports transformers to decode, which takes seconds

        top_tokens.show(cache, sample, tokenizer)
    if check:
        from pipeline.results.cache import verify as verification

        verification.run(cache)


def show(cache: CacheOnDisk) -> None:
    """Print a cache's identity, state, sizes, speed and fidelity."""
    console = Console(highlight=False)
    console.print(str(cache.path), markup=False, soft_wrap=True)  # unbroken, to be copied
    console.print(_two_columns(None, identity(cache)))
    console.print()
    console.print(_two_columns("on disk", contents(cache)))
    console.print()
    for line in _missing_lines(cache):
        console.print(line, markup=False, soft_wrap=True)
    measured = fidelity(cache)
    if measured is None or not measured.tokens:
        console.print("fidelity: nothing measured")
    else:
        console.print(_fidelity_table(cache, measured))
        for line in _legend(measured):
            console.print(line, markup=False)


def identity(cache: CacheOnDisk) -> dict[str, str]:
    """{name: text} of what the cache was made from; fingerprints in full."""
    made = cache.identity
    params = ", ".join(f"{name} {value}" for name, value in made.codec.items() if name != "name")
    layers = ", ".join(map(str, made.layers))
    data = cache.manifest["fingerprints"].get("data") if cache.manifest else None
    return {
        "codec": f"{made.codec['name']} ({params})",
        "layers": f"{layers} ({len(made.layers)}, the last is the teacher's own last layer)",
        "vocabulary": _vocabulary(made),
        **{name: value for name, value in made.fingerprints.items() if name != VOCABULARY},
        **({"data": data} if data else {}),
    }


def _vocabulary(made: CacheIdentity) -> str:
    if not made.mapped:
        return f"{made.vocab:,} ids"
    return f"mapped: the student's {made.student_ids:,} ids, and one bucket for all else that the teacher says"


def contents(cache: CacheOnDisk) -> dict[str, str]:
    """{name: text}: state, number of shards, samples and tokens, bytes, and speed."""
    samples = sum(len(shard["keys"]) for shard in cache.intact)
    tokens = sum(shard["tokens"] for shard in cache.intact)
    skipped = sum(len(shard["skipped"]) for shard in cache.intact)
    token_layers = tokens * len(cache.identity.layers)
    size = size_of(cache.path)
    rows = {
        "state": cache.state,
        "shards": f"{len(cache.intact):,}",
        "samples": f"{samples:,}, of which skipped {skipped:,}",
        "tokens": f"{tokens:,} {_kind_of_tokens(cache)}, {token_layers:,} token-layers",
        "bytes": f"{size:,}: " + ", ".join(f"{name} {size_text(of)}" for name, of in _bytes_by_kind(cache.path)),
    }
    if token_layers:
        rows["bytes a token-layer"] = f"{size / token_layers:.2f}, all files counted"
    if (share := bucket_share(cache)) is not None:
        means = ", ".join(f"{mean:.2%}" for mean in share.means())
        rows["bucket"] = f"mean of the teacher's probability in it, on {share.tokens:,} tokens, by layer: {means}"
    speed = tokens_per_second(cache)
    if speed is not None:
        layers = speed * len(cache.identity.layers)
        rows["speed"] = f"{speed:,.0f} tokens/s ({layers:,.0f} token-layers/s), the last job's average"
    return rows


def tokens_per_second(cache: CacheOnDisk) -> float | None:
    """Average response tokens per second of the last job that wrote to this cache.

    None if the run is not known, or if its metrics are all of other caches.
    """
    if cache.recipe is None:
        return None
    lines = [line for line in read_metrics(cache.recipe.parent, "cache") if line.get("cache") == cache.path.name]
    return lines[-1].get("tokens_per_s") if lines else None


def fidelity(cache: CacheOnDisk) -> Fidelity | None:
    """Fidelity measured while the shards were made, summed over all intact shards; None if nothing was measured."""
    parts = [Fidelity.from_json(shard["fidelity"]) for shard in cache.intact if "fidelity" in shard]
    return sum(parts[1:], parts[0]) if parts else None


def _kind_of_tokens(cache: CacheOnDisk) -> str:
    if not cache.identity.mapped:
        return "response tokens"
    return f"supervised of {sum(shard['response_tokens'] for shard in cache.intact):,} response tokens"


def bucket_share(cache: CacheOnDisk) -> BucketShare | None:
    """The bucket's share of a mapped vocabulary, over all intact shards; None if there is none."""
    parts = [BucketShare.from_json(shard["bucket"]) for shard in cache.intact if "bucket" in shard]
    return sum(parts[1:], parts[0]) if parts else None


def _check_options(
    sample: str | None, tokenizer: Path | None, suspects: bool, limit: int | None, output: Path | None
) -> None:
    if tokenizer is not None and sample is None:
        raise CacheError("--tokenizer DIR turns ids into words for --sample KEY: give a key too")
    if suspects and sample is not None:
        raise CacheError("--suspects ranks all samples, --sample KEY shows one of them: give one of the two")
    for name, value in (("--limit N", limit), ("--output FILE", output)):
        if value is not None and not suspects:
            raise CacheError(f"{name} is for the ranking of --suspects: give --suspects too")


def _show_list(folders: Sequence[Path], owner: Path | None) -> None:
    table = Table("cache", "state")
    table.add_column("on disk", justify="right")
    for folder in folders:
        try:
            state = inspect_cache(folder, owner).state
        except CacheError:
            state = "cannot be read: name it to see why"
        table.add_row(folder.name, state, size_text(size_of(folder)))
    Console(highlight=False).print(table)


def _two_columns(title: str | None, rows: Mapping[str, str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")  # fold: no digit of a fingerprint is lost on a narrow terminal
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _bytes_by_kind(path: Path) -> Iterator[tuple[str, int]]:
    """(kind of file, bytes) for each kind that is present, largest first."""
    kinds = {".tar": "records", ".json": "sidecars", ".int32": "order", ".safetensors": "head"}
    sizes: dict[str, int] = {}
    for file, size in sorted(listed(path, "*").items()):
        kind = "manifest" if file.name in (MANIFEST, IDENTITY) else kinds.get(file.suffix, "unfinished")
        kind = "map" if file.name == MAPPING else kind
        sizes[kind] = sizes.get(kind, 0) + size
    yield from sorted(sizes.items(), key=lambda item: -item[1])


def _missing_lines(cache: CacheOnDisk) -> Iterator[str]:
    """Lines that name damaged shards, and the command that makes what is missing."""
    broken = [f"  {name}: {why}" for name, why in cache.missing.items() if why != "not made yet"]
    if broken:
        yield "to be made again:"
        yield from broken[:SHOWN_PROBLEMS]
        if len(broken) > SHOWN_PROBLEMS:
            yield f"  and {len(broken) - SHOWN_PROBLEMS} more"
    if not cache.complete:
        yield f"next: {cache.command()}\n"


def _fidelity_table(cache: CacheOnDisk, measured: Fidelity) -> Table:
    table = Table(title=f"fidelity, on {measured.tokens:,} tokens", title_justify="left")
    for heading in ("layer", "entropy", "mass", "KL bias", "KL rms", "gradient error"):
        table.add_column(heading, justify="right")
    summary = measured.summary()
    for layer, values in zip(cache.identity.layers, summary["layers"], strict=True):
        table.add_row(str(layer), *(_number(values[name]) for name in MEASURES))
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{round(value, 4) + 0:.4f}"  # + 0 turns -0.0 into 0.0


def _legend(measured: Fidelity) -> Iterator[str]:
    yield "entropy, KL: nat a token. mass: true probability of the stored ids."
    yield "KL bias, rms: mean and root mean square of the cache's KL less the true one,"
    yield "  with the cached layer below standing in for a student."
    yield "gradient error: of that KL's gradient at the head's input, relative, by token."
    moved = measured.draw_tv()
    if moved is not None:
        yield f"draw: cached KL moves Algorithm 1's draws by {moved:.4f} (total variation)."
