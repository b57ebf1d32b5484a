import pytest

from llmos_cli.errors import UsageError
from llmos_cli.train.config import Options
from llmos_cli.train.tune.space import Choice, Span, parse_search

GOOD = """
[search]
lr = {low = 1e-4, high = 1e-2, log = true}
depth = [1, 2, 4]
warmup = {low = 0, high = 20, step = 5}

[train]
steps = 200
data = "web"
save_every = 50
"""


def test_a_search_file_says_what_is_searched_and_what_is_fixed() -> None:
    search = parse_search(GOOD, "s.toml")
    assert search.dimensions == (
        Span("lr", 1e-4, 1e-2, log=True),
        Choice("depth", (1, 2, 4)),
        Span("warmup", 0, 20, step=5, whole=True),
    )
    assert (search.fixed, search.data, search.model, search.save_every) == (Options(steps=200), "web", None, 50)
    assert search.options({"lr": 0.001, "depth": 2}) == Options(steps=200, lr=0.001, depth=2)


def test_the_first_trial_takes_the_defaults_if_the_space_holds_them() -> None:
    search = parse_search("[search]\nlr = {low = 1e-4, high = 1e-2}\ndepth = [1, 2]\n", "s.toml")
    assert search.defaults(from_model=False) == {"lr": 1e-3, "depth": 2}
    assert parse_search("[search]\nlr = [0.5, 0.25]\n", "s.toml").defaults(from_model=False) is None
    assert parse_search("[search]\nlr = [5e-5, 0.25]\n", "s.toml").defaults(from_model=True) == {"lr": 5e-5}


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("[search]\nlrr = [1, 2]\n", "s.toml [search] has the unknown key 'lrr'", "did you mean 'lr'?"),
        ("[search]\nlr = [0.1]\n[train]\nstep = 3\n", "s.toml [train] has the unknown key 'step'", "'steps'?"),
        ("[serch]\nlr = [0.1]\n", "s.toml has the unknown key 'serch'", "did you mean 'search'?"),
        ("[search]\nlr = {low = 1, hgh = 2}\n", "[search] lr has the unknown key 'hgh'", "did you mean 'high'?"),
        ("[train]\nsteps = 3\n", "has nothing to search", "[search]"),
        ("[search]\nlr = 0.1\n", "neither a list nor a span", "{low"),
        ("[search]\nlr = {low = 1}\n", "does not say its 'high' end", ""),
        ("[search]\nlr = {low = 2, high = 1}\n", "low must be below high", ""),
        ("[search]\nlr = {low = 0, high = 1, log = true}\n", "begins above 0", ""),
        ("[search]\nlr = {low = nan, high = 1}\n", "low must be a number", ""),
        ("[search]\ndepth = {low = 1.5, high = 4}\n", "low must be a whole number", ""),
        ("[search]\nprecision = {low = 1, high = 4}\n", "precision is not a number", "list what it may be"),
        ("[search]\nlr = [0.1, 0.1]\n", "different values", ""),
        ("[search]\ndepth = [1, 'two']\n", "'two' is not a whole number", ""),
        ("[search]\nlr = [0.1]\n[train]\nsteps = 'many'\n", "'many' is not a whole number", ""),
        ("[search]\nlr = [0.1]\n[train]\nlr = 0.1\n", "'lr' is both searched and fixed", ""),
        ("[search\n", "s.toml is not valid TOML", ""),
    ],
)
def test_what_does_not_make_sense_is_refused_by_name(text: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_search(text, "s.toml")
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")


def test_train_is_asked_about_both_ends_of_a_span() -> None:
    with pytest.raises(UsageError, match="--lr"):
        parse_search("[search]\nlr = {low = -1, high = 1}\n", "s.toml").check(from_model=False)
    with pytest.raises(UsageError, match="--depth and --model"):
        parse_search("[search]\ndepth = [1, 2]\n", "s.toml").check(from_model=True)
    with pytest.raises(UsageError, match="--precision fp7"):
        parse_search("[search]\nprecision = ['fp32', 'fp7']\n", "s.toml").check(from_model=False)
