"""The figure: a panel for each cell with five seeds, and the same bytes for the same results."""

import pytest

from bench.ladder import figure


@pytest.fixture
def cells():
    def cell(text, seeds):
        scores = {str(seed): 0.5 + 0.05 * seed for seed in range(seeds)}
        arm = {"seeds": scores, "mean": 0.6, "low": 0.5, "high": 0.7}
        arms = {"finetune": arm, "interaction": arm}
        return {"text": text, "seeds": seeds, "arms": arms, "teacher": {"mean": 1.0}, "untouched": {"mean": 0.2}}

    return {"a": cell("the first cell", 5), "b": cell("of three seeds", 3), "c": cell("the last cell", 5)}


def test_cells_with_five_seeds_have_a_panel_and_the_file_is_reproducible(cells, tmp_path):
    figure.draw(cells, tmp_path / "figures" / "one.svg")
    figure.draw(cells, tmp_path / "figures" / "two.svg")
    one = (tmp_path / "figures" / "one.svg").read_text()
    assert one == (tmp_path / "figures" / "two.svg").read_text()
    for text in ("the first cell", "the last cell", "finetune", "interaction"):
        assert f"<!-- {text} -->" in one
    assert "of three seeds" not in one and "deep_supervision" not in one


def test_without_such_a_cell_nothing_is_written(cells, tmp_path):
    figure.draw({"b": cells["b"]}, tmp_path / "figures" / "none.svg")
    assert not (tmp_path / "figures").exists()
