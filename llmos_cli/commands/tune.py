"""`llmos tune`: search for the options of `train` that give the least loss."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmos_cli.errors import LlmosError, UsageError, from_os_error
from llmos_cli.ui.session import session
from llmos_cli.ui.text import count, plural

if TYPE_CHECKING:
    from llmos_cli.formats.canonical import Json
    from llmos_cli.train.tune.study import Trial
    from llmos_cli.train.tune.tune import Tuned, TunePlan
    from llmos_cli.ui.output import Output


def tune(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The best model's ref; trials are NAME-trial-N.")],
    search: Annotated[
        Path, typer.Argument(metavar="SEARCH.toml", help="What is searched and what is fixed.", readable=False)
    ],
    *,
    data: Annotated[
        str | None, typer.Option("--data", metavar="REF", help="The dataset to train on.", show_default=False)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="REF", help="Start every trial from this model.", show_default=False),
    ] = None,
    valid: Annotated[
        str | None,
        typer.Option("--valid", metavar="REF", help="Score trials on this dataset.", show_default=False),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            "--split", metavar="train|valid|test", help="Of which split.  [default: valid, if --data has one]"
        ),
    ] = None,
    trials: Annotated[
        int, typer.Option("--trials", metavar="N", min=1, help="All in all, those of before included.")
    ] = 20,
    jobs: Annotated[int, typer.Option("--jobs", metavar="N", min=1, help="Trials at a time.")] = 1,
    pruner: Annotated[
        str, typer.Option("--pruner", metavar="median|hyperband|none", help="Who ends trials early.")
    ] = "median",
) -> None:
    """Search for the options of train that give the least loss.

    The search file says what is searched and what is fixed, by the names of train's options:

    Example file:
      [search]
      lr = {low = 1e-4, high = 1e-2, log = true}
      depth = [1, 2, 4]
      [train]
      steps = 200

    The first trial takes train's defaults, if they lie in the space. A checkpoint that is worse than those of other
    trials ends its trial. Each trial is a run of train and shares its data with the others; NAME points to the best.
    Stopped or killed, the same command goes on with every trial where it was.

    Examples:
      llmos tune best search.toml --data web --trials 30
      llmos tune best search.toml --data web --valid news --jobs 2 --pruner hyperband
    """
    from llmos_cli.train.tune.space import parse_search

    here = session(ctx)
    _need_optuna()
    parsed = parse_search(_read(search), str(search))
    from llmos_cli.train.tune.tune import Asked, plan_tuning
    from llmos_cli.train.tune.tune import tune as run_search

    asked = Asked(name, parsed, trials, jobs, data, model, valid, split, pruner)
    with here.open_store() as store:
        plan = plan_tuning(store, asked)
        for note in plan.notes:
            here.out.say(note)
        tuned = run_search(
            store,
            plan,
            progress=here.out.progress,
            safe=here.safe_stores,
            ended=lambda trial: here.out.detail(_sentence(plan, trial)),
        )
    here.out.result(_as_json(plan, tuned))
    _show(here.out, plan, tuned)


def _need_optuna() -> None:
    from importlib.util import find_spec

    if find_spec("optuna") is None:
        raise UsageError("tune needs optuna, which is not installed", hint="pip install 'llmos[tune]'")


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as exc:
        raise from_os_error(exc, f"reading {path}") from exc
    except UnicodeDecodeError as exc:
        raise UsageError(f"{path} is not UTF-8 text") from exc


def _sentence(plan: "TunePlan", trial: "Trial") -> str:
    value = "" if trial.value is None else f", loss {trial.value:.4f}"
    return f"{plan.trial_name(trial.number)} {trial.state}{value}{f': {trial.why}' if trial.why else ''}"


def _as_json(plan: "TunePlan", tuned: "Tuned") -> "dict[str, Json]":
    best = tuned.best
    return {
        "ref": str(tuned.ref),
        "id": None if tuned.model is None else str(tuned.model),
        "objective": {"data": str(plan.objective.data), "split": plan.objective.split},
        "best": None if best is None else _trial_json(plan, best),
        "trials": [_trial_json(plan, trial) for trial in tuned.trials],
        "journal": str(tuned.journal),
    }


def _trial_json(plan: "TunePlan", trial: "Trial") -> "dict[str, Json]":
    return {
        "number": trial.number,
        "run": plan.trial_name(trial.number),
        "state": trial.state,
        "loss": trial.value,
        "step": trial.steps,
        "params": dict(trial.params),
        "why": trial.why,
        "losses": {str(step): value for step, value in sorted(trial.reports.items())},
    }


def _show(out: "Output", plan: "TunePlan", tuned: "Tuned") -> None:
    names = [item.name for item in plan.asked.search.dimensions]
    rows = []
    for trial in sorted(tuned.trials, key=_rank):
        loss = "" if trial.value is None else f"{trial.value:.4f}"
        values = [_short(trial.params.get(name)) for name in names]
        rows.append([str(trial.number), trial.state, loss, count(trial.steps), *values, trial.why or ""])
    out.table(
        ["trial", "state", "loss", "step", *names, ""], rows, right=range(2, 4 + len(names)), spare=[4 + len(names)]
    )
    if tuned.best is None or tuned.model is None:
        why = next((trial.why for trial in tuned.trials if trial.why), "")
        raise LlmosError(f"none of {plural(len(tuned.trials), 'trial')} was finished: {why}")
    out.line(f"model {tuned.ref} @{tuned.model.short} is trial {tuned.best.number}, loss {tuned.best.value:.4f}")
    out.hint(f"llmos show {tuned.ref.name}")
    out.hint(f"llmos eval {tuned.ref.name} --data {plan.asked.data or plan.asked.search.data}")


def _rank(trial: "Trial") -> tuple[bool, float, int]:
    return trial.state != "done", float("inf") if trial.value is None else trial.value, trial.number


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
