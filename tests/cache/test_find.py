"""A run's caches side by side: what goes on in which folder, and which one stage 2 opens."""

import json
import os
import shlex
import shutil
import subprocess

import pytest
from random_cache import LAYERS, MADE_BY, fill, identity, write_data

from pipeline.cache.find import folder_for, open_cache
from pipeline.cache.paths import newest
from pipeline.cache.writer import CacheFolder
from pipeline.errors import CacheError

AGAIN = "deepspeed launch/cache.py --recipe R"
SAMPLED = {"name": "sampled", "points": 16, "seed": 0}
AS_CACHED = {"codec": "sampled", "points": 16}


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


def make(root, data, names=None, **options):
    """Fill the folder of this making; returns it."""
    made_of = identity(**{**AS_CACHED, **options})
    path = folder_for(root, made_of, data)
    fill(CacheFolder(path, made_of, data), data, names)
    return path


def opened(root, data, expected=MADE_BY, codec=SAMPLED, layers=LAYERS):
    return open_cache(root, data, expected, codec, layers, "R")


def refusal(root, data, **options):
    with pytest.raises(CacheError) as caught:
        opened(root, data, **options)
    return str(caught.value)


def test_a_making_has_one_folder_named_by_its_codec(tmp_path, data):
    path = make(tmp_path, data, ["000000.tar"])
    assert path.parent == tmp_path and path.name.startswith("sampled-") and len(path.name) == len("sampled-") + 8
    assert make(tmp_path, data) == path, "a job that goes on, or another one beside it"
    assert folder_for(tmp_path / "elsewhere", identity(**AS_CACHED), data).name == path.name, "nothing of chance"
    assert opened(tmp_path, data).path == path == newest(tmp_path)


def test_more_data_goes_on_in_the_same_folder(tmp_path, data):
    path = make(tmp_path, data)
    before = {file.name: file.stat().st_mtime_ns for file in path.glob("*.tar")}
    more = write_data(tmp_path / "more", shards=5)
    assert folder_for(tmp_path, identity(**AS_CACHED), more) == path
    assert "has 3 of 5 shards, 12 of 20 keys; first missing 'k012' in 000003.tar" in refusal(tmp_path, more)
    assert make(tmp_path, more) == path and len(opened(tmp_path, more)) == 20
    assert {name: (path / name).stat().st_mtime_ns for name in before} == before, "what was there was not made again"
    assert "expected the 3 shards" in refusal(tmp_path, data), "the data of before is not what is cached now"


@pytest.mark.parametrize(
    "made_of",
    [
        identity("sampled", points=32),
        identity("sampled", points=16, seed=1),
        identity("topk", k=4),
        identity(**AS_CACHED, layers=(2, 4)),
        identity(**AS_CACHED, layers=(2, 3, 4, 6)),
        identity(**AS_CACHED, made_by={**MADE_BY, "verbalizers": "zz"}),
        identity(**AS_CACHED, made_by={**MADE_BY, "weights": "zz"}),
    ],
    ids=["points", "seed", "codec", "fewer layers", "more layers", "verbalizers", "weights"],
)
def test_another_making_lies_beside_the_old_one(tmp_path, data, made_of):
    old = make(tmp_path, data)
    content = {file.name: file.read_bytes() for file in old.iterdir()}
    new = folder_for(tmp_path, made_of, data)
    assert new != old and new.name.startswith(made_of.codec["name"])
    assert fill(CacheFolder(new, made_of, data), data)
    assert {file.name: file.read_bytes() for file in old.iterdir()} == content
    assert folder_for(tmp_path, made_of, data) == new and folder_for(tmp_path, identity(**AS_CACHED), data) == old


def test_a_changed_data_shard_begins_another_cache(tmp_path, data):
    old = make(tmp_path, data)
    changed = write_data(tmp_path / "changed", salt={2})
    assert "was made from something else (data)" in refusal(tmp_path, changed)
    new = make(tmp_path, changed)
    assert new != old
    assert opened(tmp_path, changed).path == new and opened(tmp_path, data).path == old


def test_fewer_data_shards_begin_another_cache(tmp_path, data):
    old = make(tmp_path, data)
    fewer = write_data(tmp_path / "fewer", shards=2)
    assert make(tmp_path, fewer) != old
    assert len(opened(tmp_path, fewer)) == 8 and len(opened(tmp_path, data)) == 12


def test_data_that_grew_and_was_cut_back_lies_beside_what_it_grew_to(tmp_path, data):
    """The name of its first folder is taken: that one holds more by now."""
    grown = make(tmp_path, data)
    more = write_data(tmp_path / "more", shards=5)
    assert make(tmp_path, more) == grown
    cut = make(tmp_path, data, ["000000.tar"])
    assert cut != grown and make(tmp_path, data) == cut, "and the next job goes on there"
    assert opened(tmp_path, data).path == cut and opened(tmp_path, more).path == grown


def test_a_foreign_or_damaged_shard_begins_no_other_cache(tmp_path, data):
    path = make(tmp_path, data)
    data = write_data(tmp_path / "more", shards=4)  # so that the folder's name is not that of this data
    assert make(tmp_path, data) == path
    other = make(tmp_path / "other", write_data(tmp_path / "others", salt={1}), made_by={"weights": "zz"})
    for name in ("000001.tar", "000001.json"):
        shutil.copy(other / name, path / name)
    sidecar = path / "000002.json"
    said = json.loads(sidecar.read_text())["data_sha256"]
    sidecar.write_text(sidecar.read_text().replace(said, said[:-1] + ("0" if said[-1] == "1" else "1")))
    assert list(CacheFolder(path, identity(**AS_CACHED), data).missing()) == ["000001.tar", "000002.tar"]
    assert make(tmp_path, data) == path == opened(tmp_path, data).path


def test_damaged_folders_and_other_versions_are_nobodys(tmp_path, data):
    path = make(tmp_path, data)
    for content in ("{", (path / "cache.json").read_text().replace('"version": 2', '"version": 1')):
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / "cache.json").write_text(content)
        assert make(tmp_path, data) == path == opened(tmp_path, data).path


def test_no_cache_says_how_to_make_one(tmp_path, data):
    assert newest(tmp_path / "none") is None
    assert refusal(tmp_path / "none", data) == f"no teacher cache in {tmp_path / 'none'}; make it: {AGAIN}"


def test_one_that_does_not_fit_says_why_with_both_values(tmp_path, data):
    path = make(tmp_path, data)
    message = refusal(tmp_path, data, codec={**SAMPLED, "points": 64})
    assert message.startswith(f"{path} was made from something else (codec)")
    assert '"points": 64' in message and '"points": 16' in message and message.endswith(AGAIN)
    message = refusal(tmp_path, data, expected={**MADE_BY, "verbalizers": "zz"})
    assert "verbalizers: expected zz, found bb" in message and message.endswith(AGAIN)
    assert "[5] missing. Ask for cached ones (interact.teacher_layers)" in refusal(tmp_path, data, layers=(2, 5))


def test_what_was_moved_aside_is_no_cache_any_more(tmp_path, data):
    """The commands that refusals end in: each is followed here, and then does what it says."""
    path = make(tmp_path, data)
    (path / "cache.json").write_text(json.dumps({**json.loads((path / "cache.json").read_text()), "layers": None}))
    aside, _ = refusal(tmp_path, data).rsplit("again: ", 1)[1].split(" && ")
    for _ in range(2):  # the second moves it into the folder that is there
        subprocess.run(shlex.split(aside), check=True)
        assert newest(tmp_path) is None and refusal(tmp_path, data).startswith("no teacher cache in")
        assert make(tmp_path, data) == path == opened(tmp_path, data).path


def test_of_several_that_do_not_fit_the_one_that_is_wanted_says_why(tmp_path, data):
    """A trial of something else was begun after it, and so was a cache for other data."""
    path = make(tmp_path, data)
    make(tmp_path, data, points=32)
    others = write_data(tmp_path / "others", salt={0})
    make(tmp_path, others)
    (path / "000001.tar").unlink()
    message = refusal(tmp_path, data)
    assert message.startswith(f"{path} has 2 of 3 shards") and "000001.tar (the file is gone)" in message
    assert message.endswith(f"\n(2 other cache(s) in {tmp_path} do not fit either)")
    shutil.rmtree(path)
    assert "was made from something else (data)" in refusal(tmp_path, data)


def test_of_several_that_do_not_fit_the_newest_says_why(tmp_path, data):
    old = make(tmp_path, data, made_by={**MADE_BY, "verbalizers": "old"})
    os.utime(old / "cache.json", (0, 0))
    path = make(tmp_path, data, made_by={**MADE_BY, "verbalizers": "new"})
    message = refusal(tmp_path, data)
    assert message.startswith(f"{path} was made from") and "verbalizers: expected bb, found new" in message
    assert message.endswith(f"\n(1 other cache(s) in {tmp_path} do not fit either)")


def test_the_one_that_fits_is_opened_wherever_it_stands_among_them(tmp_path, data):
    paths = [make(tmp_path, data, points=points) for points in (16, 32, 64)]
    for path, points in zip(paths, (16, 32, 64), strict=True):
        assert opened(tmp_path, data, codec={**SAMPLED, "points": points}).path == path


def test_two_that_fit_are_refused_by_name(tmp_path, data):
    """The teacher's folder is gone, so nobody knows whose words are meant."""
    one = make(tmp_path, data, made_by={**MADE_BY, "weights": "xx"})
    two = make(tmp_path, data, made_by={**MADE_BY, "weights": "yy"})
    known = {name: value for name, value in MADE_BY.items() if name != "weights"}
    message = refusal(tmp_path, data, expected=known)
    assert message == (
        f"expected one cache that fits, found 2: {one}, {two}; they differ in what this run does not know (such as "
        "the teacher's weights, whose folder is gone). Move aside those that are not meant, such as the first: "
        f"mv {one} {one}.old"
    )
    assert opened(tmp_path, data, expected={**MADE_BY, "weights": "yy"}).path == two
    subprocess.run(shlex.split(message.rsplit(": ", 1)[1]), check=True)
    assert opened(tmp_path, data, expected=known).path == two
