"""The figure of regimes: a panel for what changes between two or more cells that have run."""

import pytest

from bench.ladder import regimes
from bench.ladder.arms import BY_NAME
from bench.ladder.cells import SCALES


@pytest.fixture
def cells():
    found = {}
    for cell in SCALES["cpu"].cells:
        arm = {"seeds": {str(seed): 0.5 + cell.wrong / 4 + seed / 50 for seed in range(cell.seeds)}}
        found[cell.name] = {
            "wrong": cell.wrong, "samples": cell.samples, "updates": cell.updates,
            "arms": {"finetune": arm, "interaction": arm},
        }  # fmt: skip
    return found


def test_each_panel_s_cells_differ_in_its_field_alone():
    cells = {cell.name: cell for cell in SCALES["cpu"].cells}
    for field, names in regimes.AXES.values():
        settings = [(cells[name].data, cells[name].wrong, cells[name].samples, cells[name].updates) for name in names]
        values = [getattr(cells[name], field) for name in names]
        assert values == sorted(set(values))
        place = ("data", "wrong", "samples", "updates").index(field)
        assert len({one[:place] + one[place + 1 :] for one in settings}) == 1
    assert set(regimes.ARMS) <= {name for name, arm in BY_NAME.items() if arm.main}


def test_the_file_is_reproducible_and_has_a_panel_for_each_axis(cells, tmp_path):
    regimes.draw(cells, tmp_path / "one.svg")
    regimes.draw(cells, tmp_path / "two.svg")
    one = (tmp_path / "one.svg").read_text()
    assert one == (tmp_path / "two.svg").read_text()
    for text in (*regimes.AXES, "finetuning", "interaction to the end"):
        assert f"<!-- {text} -->" in one


def test_one_cell_is_no_regime(cells, tmp_path):
    regimes.draw({"puzzles-40": cells["puzzles-40"]}, tmp_path / "figures" / "none.svg")
    assert not (tmp_path / "figures").exists()


def test_a_line_is_of_the_seeds_that_all_its_points_have():
    five, three = {"seeds": {str(n): n / 10 for n in range(5)}}, {"seeds": {str(n): 0.5 for n in range(3)}}
    left, right = regimes.over_shared_seeds([five, three])
    assert left.mean == pytest.approx(0.1) and left.low < 0.1 < left.high and right.mean == 0.5
    assert regimes.over_shared_seeds([five])[0].mean == pytest.approx(0.2)
    assert regimes.over_shared_seeds([]) == []
