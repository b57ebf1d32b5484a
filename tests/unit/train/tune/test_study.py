from pathlib import Path

import pytest

from llmos_cli.errors import Damaged, UsageError
from llmos_cli.train.tune.space import Search, parse_search
from llmos_cli.train.tune.study import Study, Trial

SEARCH = parse_search("[search]\nlr = {low = 1e-4, high = 1e-1, log = true}\ndepth = [1, 2, 4]\n", "s.toml")


def opened(folder: Path, search: Search = SEARCH, pruner: str = "median") -> Study:
    return Study(folder / "best.journal", search, search.as_json(), pruner=pruner, steps=90)


def test_a_search_that_was_killed_asks_what_it_would_have_asked(tmp_path: Path) -> None:
    def next_trial(study: Study, loss: float) -> Trial:
        trial = study.ask(None, seed=3, at_once=False)
        study.done(trial.number, loss)
        return trial

    (tmp_path / "a").mkdir()
    straight = opened(tmp_path / "a")
    expected = [next_trial(straight, float(number)) for number in range(4)]
    found = [next_trial(opened(tmp_path / "b"), float(number)) for number in range(4)]
    assert [trial.params for trial in found] == [trial.params for trial in expected]
    assert len({trial.params["lr"] for trial in found}) == 4


def test_a_trial_without_an_end_goes_on_with_its_values(tmp_path: Path) -> None:
    study = opened(tmp_path)
    begun = study.ask({"lr": 0.001, "depth": 2}, seed=0, at_once=False)
    assert begun.params == {"lr": 0.001, "depth": 2}
    study.report(begun.number, 10, 4.5)
    with open(tmp_path / "best.journal", "ab") as file:
        file.write(b'{"op_code": 8, "wor')  # what a kill leaves
    again = opened(tmp_path)
    (trial,) = again.trials()
    assert (trial.state, trial.value, trial.steps) == ("running", 4.5, 10)
    assert again.go_on(0).params == begun.params
    assert not again.report(0, 10, 4.5), "the same report again is not another one"
    again.done(0, 4.0)
    best = opened(tmp_path).best()
    assert best is not None
    assert (best.state, best.value, best.number) == ("done", 4.0, 0)


def test_a_trial_much_worse_than_the_others_is_ended_early(tmp_path: Path) -> None:
    study = opened(tmp_path)
    for loss in (1.0, 1.1, 1.2, 1.3):
        number = study.ask(None, seed=0, at_once=False).number
        assert not study.report(number, 30, loss)
        study.done(number, loss)
    number = study.ask(None, seed=0, at_once=False).number
    assert study.report(number, 30, 9.0)
    study.prune(number, "worse than others at step 30")
    last = study.trials()[-1]
    assert (last.state, last.value, last.why) == ("pruned", 9.0, "worse than others at step 30")
    best = study.best()
    assert best is not None
    assert best.value == 1.0


def test_hyperband_and_none_are_pruners_and_others_are_not(tmp_path: Path) -> None:
    for pruner in ("hyperband", "none"):
        study = opened(tmp_path / pruner, pruner=pruner)
        number = study.ask(None, seed=0, at_once=True).number
        assert not study.report(number, 10, 1.0)
    with pytest.raises(UsageError, match="--pruner best"):
        opened(tmp_path, pruner="best")


def test_another_search_of_the_same_name_is_refused_and_says_why(tmp_path: Path) -> None:
    opened(tmp_path)
    other = parse_search("[search]\nlr = [0.1, 0.2]\n", "s.toml")
    with pytest.raises(UsageError, match="best was begun as another search: it differs in search") as caught:
        opened(tmp_path, other)
    assert str(tmp_path / "best.journal") in (caught.value.hint or "")


def test_a_journal_of_something_else_is_damage(tmp_path: Path) -> None:
    (tmp_path / "best.journal").write_bytes(b"not a journal\nat all\n")
    with pytest.raises(Damaged, match="best"):
        opened(tmp_path)
