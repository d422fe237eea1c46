"""One tiny run for all tests here: two models, shards, moved verbalizers, a distilled student."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tiny import chats, write_vlm
from tiny_run import DEPTH, WIDTH, typed, write_recipe, write_shards, write_verb_ffns

from pipeline.runtime.folder import mark_done


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> SimpleNamespace:
    """A folder with `teacher`, `student`, `shards/{train,held_out}` and `run`, which is verbalized and distilled."""
    root = tmp_path_factory.mktemp("results")
    for seed, role in enumerate(("teacher", "student")):
        write_vlm(root / role, "qwen2_vl", DEPTH[role], WIDTH[role], seed=seed)
    write_shards(root / "shards" / "train", chats(12, seed=1))
    write_shards(root / "shards" / "held_out", typed(chats(10, seed=2)))
    run = root / "run"
    for role in ("teacher", "student"):
        write_verb_ffns(run / "verbalize" / f"{role}.safetensors", role, moved=True)
    mark_done(run / "verbalize", {"updates": 3, "vocab": 265, "losses": {"teacher/1": 5.0, "student/1": 5.5}})
    write_vlm(run / "student", "qwen2_vl", DEPTH["student"], WIDTH["student"], seed=9)
    write_recipe(run, root)
    return SimpleNamespace(root=root, run=run, held_out=root / "shards" / "held_out", recipe=run / "recipe.yaml")
