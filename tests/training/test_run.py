"""When a run stops, and which of its snapshots is the best."""

import pytest

import minegan_fast as mf
from minegan_fast.training import run

pytestmark = pytest.mark.filterwarnings("ignore:.*were enlarged")


def measures(monkeypatch, kids: list[float]) -> None:
    """These are the KIDs of the snapshots."""
    found = iter(kids)

    def measured(fake, real, names):
        return {"kid": 9.0} if names == ("kid",) else {"kid": next(found), "diversity": 1.0}  # of the training images

    monkeypatch.setattr(run, "measure", measured)


def test_patience_stops_finetuning(run_settings, monkeypatch):
    measures(monkeypatch, [5.0, 4.0, 3.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    result = mf.transfer(**{**run_settings, "finetune_steps": 40, "patience": 2})
    assert result.step == 6
    assert result.history[-1]["step"] == 10, "two snapshots without a gain end stage 2"


def test_a_run_that_never_beat_the_source_says_so(run_settings, monkeypatch):
    measures(monkeypatch, [1.0, 2.0, 2.0, 2.0, 2.0])
    with pytest.warns(UserWarning, match="look at last/") as warned:
        assert mf.transfer(**run_settings).step == 0
    assert [w.filename for w in warned if "look at last/" in str(w.message)] == [__file__]
