"""A run's caches: which folder a job continues in, and which cache stage 2 opens."""

import json
import os
import shlex
import shutil
import subprocess

import pytest
from random_cache import FINGERPRINTS, LAYERS, fill, identity, write_data

from pipeline.cache.find import folder_for, open_cache
from pipeline.cache.paths import newest
from pipeline.cache.writer import CacheFolder
from pipeline.errors import CacheError

CACHE_COMMAND = "deepspeed launch/cache.py --recipe R"
SAMPLED = {"name": "sampled", "points": 16, "seed": 0}
AS_CACHED = {"codec": "sampled", "points": 16}


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


def make(root, data, names=None, **options):
    """Write the cache of this identity and return its folder. `names`: only these shards."""
    of = identity(**{**AS_CACHED, **options})
    path = folder_for(root, of, data)
    fill(CacheFolder(path, of, data), data, names)
    return path


def opened(root, data, expected=FINGERPRINTS, codec=SAMPLED, layers=LAYERS):
    return open_cache(root, data, expected, codec, layers, "R")


def refusal(root, data, **options):
    with pytest.raises(CacheError) as caught:
        opened(root, data, **options)
    return str(caught.value)


def test_an_identity_has_one_folder_named_by_its_codec(tmp_path, data):
    path = make(tmp_path, data, ["000000.tar"])
    assert path.parent == tmp_path and path.name.startswith("sampled-") and len(path.name) == len("sampled-") + 8
    assert make(tmp_path, data) == path, "a job that continues, or another one in parallel"
    assert folder_for(tmp_path / "elsewhere", identity(**AS_CACHED), data).name == path.name, (
        "the name is deterministic"
    )
    assert opened(tmp_path, data).path == path == newest(tmp_path)


def test_more_data_continues_in_the_same_folder(tmp_path, data):
    path = make(tmp_path, data)
    before = {file.name: file.stat().st_mtime_ns for file in path.glob("*.tar")}
    more = write_data(tmp_path / "more", shards=5)
    assert folder_for(tmp_path, identity(**AS_CACHED), more) == path
    assert "has 3 of 5 shards, 12 of 20 keys; first missing 'k012' in 000003.tar" in refusal(tmp_path, more)
    assert make(tmp_path, more) == path and len(opened(tmp_path, more)) == 20
    assert {name: (path / name).stat().st_mtime_ns for name in before} == before, "existing shards were not made again"
    assert "expected the 3 shards" in refusal(tmp_path, data), "the earlier data is not what is cached now"


@pytest.mark.parametrize(
    "other",
    [
        identity("sampled", points=32),
        identity("sampled", points=16, seed=1),
        identity("topk", k=4),
        identity(**AS_CACHED, layers=(2, 4)),
        identity(**AS_CACHED, layers=(2, 3, 4, 6)),
        identity(**AS_CACHED, fingerprints={**FINGERPRINTS, "verbalizers": "zz"}),
        identity(**AS_CACHED, fingerprints={**FINGERPRINTS, "weights": "zz"}),
    ],
    ids=["points", "seed", "codec", "fewer layers", "more layers", "verbalizers", "weights"],
)
def test_another_identity_gets_a_folder_of_its_own(tmp_path, data, other):
    old = make(tmp_path, data)
    content = {file.name: file.read_bytes() for file in old.iterdir()}
    new = folder_for(tmp_path, other, data)
    assert new != old and new.name.startswith(other.codec["name"])
    assert fill(CacheFolder(new, other, data), data)
    assert {file.name: file.read_bytes() for file in old.iterdir()} == content
    assert folder_for(tmp_path, other, data) == new and folder_for(tmp_path, identity(**AS_CACHED), data) == old


def test_a_changed_data_shard_starts_another_cache(tmp_path, data):
    old = make(tmp_path, data)
    changed = write_data(tmp_path / "changed", changed={2})
    assert "was made from something else (data)" in refusal(tmp_path, changed)
    new = make(tmp_path, changed)
    assert new != old
    assert opened(tmp_path, changed).path == new and opened(tmp_path, data).path == old


def test_fewer_data_shards_start_another_cache(tmp_path, data):
    old = make(tmp_path, data)
    fewer = write_data(tmp_path / "fewer", shards=2)
    assert make(tmp_path, fewer) != old
    assert len(opened(tmp_path, fewer)) == 8 and len(opened(tmp_path, data)) == 12


def test_data_that_grew_and_shrank_again_gets_a_folder_of_its_own(tmp_path, data):
    """The name of its first folder is taken: that folder holds more shards by now."""
    grown = make(tmp_path, data)
    more = write_data(tmp_path / "more", shards=5)
    assert make(tmp_path, more) == grown
    cut = make(tmp_path, data, ["000000.tar"])
    assert cut != grown and make(tmp_path, data) == cut, "the next job continues there"
    assert opened(tmp_path, data).path == cut and opened(tmp_path, more).path == grown


def test_a_foreign_or_damaged_shard_starts_no_other_cache(tmp_path, data):
    path = make(tmp_path, data)
    data = write_data(tmp_path / "more", shards=4)  # now the folder has another name than this data would get
    assert make(tmp_path, data) == path
    other = make(tmp_path / "other", write_data(tmp_path / "others", changed={1}), fingerprints={"weights": "zz"})
    for name in ("000001.tar", "000001.json"):
        shutil.copy(other / name, path / name)
    sidecar = path / "000002.json"
    sha256 = json.loads(sidecar.read_text())["data_sha256"]
    sidecar.write_text(sidecar.read_text().replace(sha256, sha256[:-1] + ("0" if sha256[-1] == "1" else "1")))
    assert list(CacheFolder(path, identity(**AS_CACHED), data).missing()) == ["000001.tar", "000002.tar"]
    assert make(tmp_path, data) == path == opened(tmp_path, data).path


def test_damaged_folders_and_other_versions_are_ignored(tmp_path, data):
    path = make(tmp_path, data)
    for content in ("{", (path / "cache.json").read_text().replace('"version": 2', '"version": 1')):
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / "cache.json").write_text(content)
        assert make(tmp_path, data) == path == opened(tmp_path, data).path


def test_the_error_for_no_cache_has_the_command(tmp_path, data):
    assert newest(tmp_path / "none") is None
    assert refusal(tmp_path / "none", data) == f"no teacher cache in {tmp_path / 'none'}; make it: {CACHE_COMMAND}"


def test_the_error_for_a_cache_that_does_not_fit_has_both_values(tmp_path, data):
    path = make(tmp_path, data)
    message = refusal(tmp_path, data, codec={**SAMPLED, "points": 64})
    assert message.startswith(f"{path} was made from something else (codec)")
    assert '"points": 64' in message and '"points": 16' in message and message.endswith(CACHE_COMMAND)
    message = refusal(tmp_path, data, expected={**FINGERPRINTS, "verbalizers": "zz"})
    assert "verbalizers: expected zz, found bb" in message and message.endswith(CACHE_COMMAND)
    assert "[5] missing. Ask for cached ones (interact.teacher_layers)" in refusal(tmp_path, data, layers=(2, 5))


def test_a_cache_that_was_moved_aside_is_ignored(tmp_path, data):
    """Run the commands that error messages end with: they have the promised effect."""
    path = make(tmp_path, data)
    (path / "cache.json").write_text(json.dumps({**json.loads((path / "cache.json").read_text()), "layers": None}))
    aside, _ = refusal(tmp_path, data).rsplit("again: ", 1)[1].split(" && ")
    for _ in range(2):  # the second one moves it into the existing .old folder
        subprocess.run(shlex.split(aside), check=True)
        assert newest(tmp_path) is None and refusal(tmp_path, data).startswith("no teacher cache in")
        assert make(tmp_path, data) == path == opened(tmp_path, data).path


def test_of_several_that_do_not_fit_the_closest_one_is_explained(tmp_path, data):
    """A cache of another identity and one for other data were started later."""
    path = make(tmp_path, data)
    make(tmp_path, data, points=32)
    others = write_data(tmp_path / "others", changed={0})
    make(tmp_path, others)
    (path / "000001.tar").unlink()
    message = refusal(tmp_path, data)
    assert message.startswith(f"{path} has 2 of 3 shards") and "000001.tar (the file is gone)" in message
    assert message.endswith(f"\n(2 other cache(s) in {tmp_path} do not fit either)")
    shutil.rmtree(path)
    assert "was made from something else (data)" in refusal(tmp_path, data)


def test_of_several_equally_close_ones_the_newest_is_explained(tmp_path, data):
    old = make(tmp_path, data, fingerprints={**FINGERPRINTS, "verbalizers": "old"})
    os.utime(old / "cache.json", (0, 0))
    path = make(tmp_path, data, fingerprints={**FINGERPRINTS, "verbalizers": "new"})
    message = refusal(tmp_path, data)
    assert message.startswith(f"{path} was made from") and "verbalizers: expected bb, found new" in message
    assert message.endswith(f"\n(1 other cache(s) in {tmp_path} do not fit either)")


def test_the_one_that_fits_is_opened_whatever_its_age(tmp_path, data):
    paths = [make(tmp_path, data, points=points) for points in (16, 32, 64)]
    for path, points in zip(paths, (16, 32, 64), strict=True):
        assert opened(tmp_path, data, codec={**SAMPLED, "points": points}).path == path


def test_two_that_fit_are_an_error_with_both_names(tmp_path, data):
    """The teacher's folder is gone, so its weights cannot tell them apart."""
    one = make(tmp_path, data, fingerprints={**FINGERPRINTS, "weights": "xx"})
    two = make(tmp_path, data, fingerprints={**FINGERPRINTS, "weights": "yy"})
    known = {name: value for name, value in FINGERPRINTS.items() if name != "weights"}
    message = refusal(tmp_path, data, expected=known)
    assert message == (
        f"expected one cache that fits, found 2: {one}, {two}; they differ in something that this run cannot "
        "check (such as the teacher's weights, whose folder is gone). Move aside those that you do not want, such as "
        "the first: "
        f"mv {one} {one}.old"
    )
    assert opened(tmp_path, data, expected={**FINGERPRINTS, "weights": "yy"}).path == two
    subprocess.run(shlex.split(message.rsplit(": ", 1)[1]), check=True)
    assert opened(tmp_path, data, expected=known).path == two
