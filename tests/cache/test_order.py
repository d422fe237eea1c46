"""The vocabulary order: by use, one for each cache, and damage is detected."""

import multiprocessing

import numpy as np
import pytest
from random_teacher import V, random_order

from pipeline.cache.order import ORDER, has_order, order_sha256, read_order, save_order
from pipeline.codec.vocabulary_order import order_by_use
from pipeline.errors import CacheError


def test_most_used_ids_come_first_and_ties_go_by_id():
    assert order_by_use(np.array([0.5, 3.0, 0.5, 7.0, 0.5])).tolist() == [3, 1, 0, 2, 4]
    use = np.random.default_rng(0).integers(0, 5, 1000)
    assert order_by_use(use).tolist() == sorted(range(1000), key=lambda i: (-use[i], i))


def test_the_first_saved_order_stays(tmp_path):
    assert not has_order(tmp_path) and order_sha256(tmp_path) is None
    save_order(tmp_path, random_order(V))
    first = order_sha256(tmp_path)
    save_order(tmp_path, np.arange(V))
    assert np.array_equal(read_order(tmp_path, V, "repair"), random_order(V))
    assert has_order(tmp_path) and order_sha256(tmp_path) == first
    assert [file.name for file in tmp_path.iterdir()] == [ORDER]


def test_the_first_saved_order_stays_without_hard_links_too(tmp_path, monkeypatch):
    def no_link(*paths):
        raise PermissionError("no links here")

    monkeypatch.setattr("os.link", no_link)
    for order in (random_order(V), np.arange(V)):
        save_order(tmp_path, order)
        assert np.array_equal(read_order(tmp_path, V, "repair"), random_order(V))
    assert [file.name for file in tmp_path.iterdir()] == [ORDER]


def _save_and_read(path, number, barrier, answers):
    order = np.roll(np.arange(V), number)
    barrier.wait()
    save_order(path, order)
    answers.put(read_order(path, V, "repair")[0])


def test_jobs_that_save_at_once_all_read_the_same_order(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(4), context.Queue()
    jobs = [context.Process(target=_save_and_read, args=(tmp_path, n, barrier, answers)) for n in range(4)]
    for job in jobs:
        job.start()
    read = {int(answers.get(timeout=60)) for _ in jobs}
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0] * 4 and len(read) == 1
    assert [file.name for file in tmp_path.iterdir()] == [ORDER]


@pytest.mark.parametrize(
    ("was", "now"),
    [(slice(-1), None), (3, 7), (V - 1, V), (0, -1), (None, V), (None, 3)],
    ids=["truncated", "id twice", "id beyond V", "negative id", "longer", "longer by a known id"],
)
def test_a_damaged_order_is_an_error(tmp_path, was, now):
    order = random_order(V)
    if now is None:
        order = order[was]
    elif was is None:
        order = np.append(order, now).astype("<i4")
    else:
        order[order == was] = now
    order.tofile(tmp_path / ORDER)
    with pytest.raises(CacheError) as caught:
        read_order(tmp_path, V, "Put it right: COMMAND")
    assert str(caught.value) == (
        f"{tmp_path / ORDER} is damaged: expected each of {V} ids once. Remove it. Put it right: COMMAND"
    )


def test_a_missing_order_and_one_of_another_vocabulary_are_errors(tmp_path):
    with pytest.raises(CacheError, match=r"no order.int32, the order of the vocabulary. Put it right: COMMAND$"):
        read_order(tmp_path, V, "Put it right: COMMAND")
    save_order(tmp_path, random_order(V))
    with pytest.raises(CacheError, match=f"expected each of {V + 1} ids once"):
        read_order(tmp_path, V + 1, "")
