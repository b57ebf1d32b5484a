"""`llmos train`: make a model out of token shards."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmos_cli.errors import UsageError, from_os_error
from llmos_cli.ui.session import Session, session
from llmos_cli.ui.settings import read_settings
from llmos_cli.ui.text import count, duration, size

if TYPE_CHECKING:
    from llmos_cli.formats.canonical import Json
    from llmos_cli.store.local import Store
    from llmos_cli.train.checkpoints.saver import Saved
    from llmos_cli.train.checkpoints.verify import Asked
    from llmos_cli.train.plan import Plan
    from llmos_cli.train.result import Trained
    from llmos_cli.train.run import Started
    from llmos_cli.ui.output import Output


def train(
    ctx: typer.Context,
    name: Annotated[
        str, typer.Argument(metavar="NAME[:TAG]", help="The model's ref; NAME:checkpoint holds its checkpoints.")
    ],
    *,
    file: Annotated[  # its callback hands what it says to the others
        Path | None,
        typer.Option(
            "--file",
            metavar="FILE",
            help="Options from a TOML file; those typed go before.",
            show_default=False,
            readable=False,
            is_eager=True,
            callback=read_settings,
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="REF", help="The dataset to train on.", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="REF", help="Start from this model.", show_default=False)
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            "--init",
            metavar="keras:FILE|tf:PREFIX",
            help="Start from a BERT of Keras or TensorFlow, kept as NAME-init.",
            show_default=False,
        ),
    ] = None,
    depth: Annotated[
        int | None,
        typer.Option(
            "--depth",
            metavar="N",
            help="A new model of N layers, 64 N wide: a BERT for mlm, classify, pair, else a Llama.  [default: 2]",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="Start from a new model of a config.json.",
            show_default=False,
            readable=False,
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", metavar="N", help="Optimizer steps.  [default: 1000]")] = None,
    batch: Annotated[int | None, typer.Option("--batch", metavar="N", help="Rows in a step.  [default: 8]")] = None,
    lr: Annotated[
        float | None,
        typer.Option("--lr", metavar="X", help="Peak learning rate.  [default: 0.001, from a model 0.00005]"),
    ] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", metavar="fp32|bf16", help="Of the arithmetic.  [default: fp32]")
    ] = None,
    save_every: Annotated[
        int | None,
        typer.Option("--save-every", metavar="N", help="Steps between checkpoints.  [default: about ten in a run]"),
    ] = None,
    eval_every: Annotated[
        int | None,
        typer.Option("--eval-every", metavar="N", help="Score the valid split every N steps, into the log."),
    ] = None,
    keep_last: Annotated[
        int | None,
        typer.Option(
            "--keep-last", metavar="N", help="Keep the newest N checkpoints.  [default: those of the last 14 days]"
        ),
    ] = None,
    keep_every: Annotated[
        int | None, typer.Option("--keep-every", metavar="N", help="Keep the weights of every N steps as NAME:step-N.")
    ] = None,
    keep_best: Annotated[
        str | None,
        typer.Option("--keep-best", metavar="METRIC", help="Keep the best weights as NAME:best: by loss, eval_loss..."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="S", help="Of weights and data order.  [default: 0]")
    ] = None,
    accumulate: Annotated[
        int | None, typer.Option("--accumulate", metavar="N", help="Compute a step in N parts, for less memory.")
    ] = None,
    warmup: Annotated[
        int | None,
        typer.Option("--warmup", metavar="N", help="Steps up to the peak rate.  [default: a tenth, at most 100]"),
    ] = None,
    clip: Annotated[
        float | None, typer.Option("--clip", metavar="X", help="Longest gradient; 0 is off.  [default: 1]")
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option("--weight-decay", metavar="X", help="Of matrices.  [default: 0.1]")
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(
            "--optimizer", metavar="NAME", help="adamw, muon, adafactor, sgd or schedule-free.  [default: adamw]"
        ),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option("--schedule", metavar="NAME", help="cosine, linear, wsd or constant.  [default: cosine]"),
    ] = None,
    ema: Annotated[
        float | None,
        typer.Option(
            "--ema", metavar="DECAY", help="The model is a moving average of the weights.", show_default=False
        ),
    ] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Compute activations twice, for less memory.")
    ] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the model by torch.compile.")] = False,
    log: Annotated[
        str | None,
        typer.Option("--log", metavar="tensorboard|wandb|mlflow|trackio", help="Draw the curves there as well."),
    ] = None,
    skip_steps: Annotated[
        str | None,
        typer.Option("--skip-steps", metavar="A-B", help="Pass over these steps, around a loss that is not a number."),
    ] = None,
    fork: Annotated[
        str | None,
        typer.Option("--fork", metavar="RUN@STEP", help="Go on from a checkpoint of another run, under this name."),
    ] = None,
    allow: Annotated[
        str | None,
        typer.Option("--allow", metavar="data,config", help="What may differ from the checkpoint when resuming."),
    ] = None,
    procs: Annotated[int, typer.Option("--procs", metavar="N", help="Share each step among N processes.")] = 1,
    parallel: Annotated[str, typer.Option("--parallel", metavar="ddp", help="What processes share: the rows.")] = "ddp",
    nnodes: Annotated[int, typer.Option("--nnodes", metavar="N", help="Machines, each with --procs.")] = 1,
    node_rank: Annotated[int, typer.Option("--node-rank", metavar="K", help="Which machine this is, from 0.")] = 0,
    rdzv: Annotated[
        str | None,
        typer.Option("--rdzv", metavar="HOST:PORT", help="Where the machines meet: the first one.", show_default=False),
    ] = None,
    show_plan: Annotated[
        bool, typer.Option("--plan", help="Say what the run would take and what fits this machine; train nothing.")
    ] = False,
    lora: Annotated[
        int | None,
        typer.Option(
            "--lora", metavar="RANK", help="Train an adapter of this rank instead of all weights.", show_default=False
        ),
    ] = None,
    lora_alpha: Annotated[
        float | None, typer.Option("--lora-alpha", metavar="X", help="Its scale.  [default: twice the rank]")
    ] = None,
    lora_targets: Annotated[
        str | None,
        typer.Option("--lora-targets", metavar="NAME,...", help="Its layers.  [default: all linear ones of the body]"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from NAME:checkpoint; options not given are taken from it.")
    ] = False,
    verify_resume: Annotated[
        bool,
        typer.Option("--verify-resume", help="Only prove it: kill and resume a short run twice, and compare the ids."),
    ] = False,
) -> None:
    """Train a model on a dataset, for the task that it was made for.

    A checkpoint is one atomic commit. Ctrl-C commits one and exits with 130; after that, or after a crash, --resume
    goes on and ends in the same id as a run that was never stopped. The same inputs and options give the same model,
    at once. --fork copies nothing; besides RUN@STEP it takes a run (its newest checkpoint), REF~N and @ID.

    Examples:
      llmos train tiny --data web --depth 4 --steps 500 --batch 16
      llmos train tiny --resume
      llmos train big --data web --depth 16 --batch 64 --plan
      llmos train big --data web --depth 16 --batch 64 --procs 2 --accumulate 4
      llmos train tiny2 --fork tiny@200 --lr 1e-4
      llmos train tiny --data web --depth 4 --verify-resume
      llmos train tiny --file train.toml --seed 7
      llmos train tuned --data notes --model tiny --steps 100 --lr 1e-4 --precision bf16
      llmos train moods --data reviews --model body --eval-every 100 --ema 0.99
      llmos train small --data notes --model tiny --lora 8 --lr 1e-3
    """
    from llmos_cli.train.checkpoints.verify import Asked
    from llmos_cli.train.config import Options, Retention, parse_allowed, parse_model_config, parse_spans
    from llmos_cli.train.method import parse_targets
    from llmos_cli.train.parallel.launch import Launch, check_launch, ignored_config, launch_run
    from llmos_cli.train.plan import hold_run, make_plan
    from llmos_cli.train.result import publish_model, use_made

    here = session(ctx)
    options = Options(
        steps=steps,
        batch=batch,
        lr=lr,
        precision=precision,
        seed=seed,
        accumulate=accumulate,
        warmup=warmup,
        clip=clip,
        weight_decay=weight_decay,
        depth=depth,
        config=None if config is None else parse_model_config(_read(config), str(config)),
        optimizer=optimizer,
        schedule=schedule,
        ema=ema,
        checkpointing=checkpointing or None,
        compile=compiled or None,
        lora=lora,
        lora_alpha=lora_alpha,
        lora_targets=None if lora_targets is None else parse_targets(lora_targets),
        skip_steps=None if skip_steps is None else parse_spans(skip_steps),
    )
    keep = Retention(keep_last, keep_every, keep_best)
    launch = Launch(procs, nnodes, node_rank, rdzv)
    with here.open_store() as store, hold_run(store, name) if node_rank == 0 else nullcontext():
        if init is not None:
            model = _bring(here, store, name, init, model)
        plan = make_plan(
            store,
            name,
            data=data,
            model=model,
            options=options,
            save_every=save_every,
            eval_every=eval_every,
            log=log,
            keep=keep,
            resume=resume,
            fork=fork,
            allow=() if allow is None else parse_allowed(allow),
        )
        check_launch(launch, parallel, plan.config.batch, plan.config.accumulate)
        for note in (*plan.notes, *ignored_config(here.home)):
            here.out.say(note)
        if show_plan:
            from llmos_cli.train.parallel.resources import find_resources, foresee
            from llmos_cli.ui.prospect import prospect_json, show_prospect

            found = foresee(store, plan, find_resources(store))
            here.out.result(prospect_json(plan, found))
            show_prospect(here.out, plan, found)
            return
        if verify_resume:
            _verify(here, store, plan, Asked(name, data, model, fork, options))
            return
        if plan.made is not None:
            trained = use_made(store, plan, plan.made)
        elif plan.resume and plan.start == plan.config.steps:
            trained = publish_model(store, plan, plan.resume.id, plan.resume.manifest)
        elif launch.ranks > 1:
            trained = launch_run(
                store,
                plan,
                launch,
                safe=here.safe_stores,
                progress=here.out.progress,
                started=lambda event: _say_start(here.out, plan, event),
                saved=lambda event: _say_saved(here.out, plan, event),
            )
        else:
            from llmos_cli.train.run import run

            trained = run(
                store,
                plan,
                progress=here.out.progress,
                started=lambda event: _say_start(here.out, plan, event),
                saved=lambda event: _say_saved(here.out, plan, event),
            )
    here.out.result(_as_json(plan, trained))
    _show(here.out, plan, trained)


def _bring(here: Session, store: "Store", name: str, source: str, model: str | None) -> str:
    """The ref of a model of another framework, brought in to start from."""
    if model is not None:
        raise UsageError("--init and --model both say what to train", hint="give one of them")
    from llmos_cli.formats.names import RefName, parse_ref
    from llmos_cli.models.foreign.bring import bring

    brought = bring(store, source, RefName(f"{parse_ref(name).name}-init"))
    here.out.say(
        f"{brought.ref} @{brought.id.short} is {source}: {count(brought.tensors)} tensors, hidden states within "
        f"{brought.difference:.1g} of the original's"
    )
    return str(brought.ref)


def _verify(here: Session, store: "Store", plan: "Plan", asked: "Asked") -> None:
    from llmos_cli.train.checkpoints.verify import verify

    found = verify(store, plan, asked, safe=here.safe_stores, progress=here.out.progress)
    here.out.result(
        {
            "equal": True,
            "steps": found.steps,
            "killed_at": list(found.killed_at),
            "resumed_at": list(found.resumed_at),
            "id": str(found.model),
            "checkpoint": str(found.checkpoint),
        }
    )
    killed, resumed = (" and ".join(map(str, steps)) for steps in (found.killed_at, found.resumed_at))
    here.out.line(
        f"killed after steps {killed} of {found.steps} and resumed at {resumed}, it ended in the ids of a run that ran "
        f"through: model @{found.model.short}, checkpoint @{found.checkpoint.short}"
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise from_os_error(exc, f"reading {path}") from exc


def _say_start(out: "Output", plan: "Plan", event: "Started") -> None:
    config = plan.config
    parts = f" in {config.accumulate} parts" if config.accumulate > 1 else ""
    out.say(f"{event.architecture}, {count(event.parameters)} parameters, on {event.device}, {config.precision}")
    each = (
        f"{count(config.batch)} examples" if event.tokens_per_step is None else f"{count(event.tokens_per_step)} tokens"
    )
    out.say(f"{count(config.steps)} steps of {each}{parts}, a checkpoint every {count(plan.save_every)} steps")
    if event.trained is not None and event.trained != event.parameters:
        out.say(f"{count(event.trained)} of them are trained, {100 * event.trained / event.parameters:.1f} %")
    if event.new:
        out.say(f"new weights, drawn by the seed: {', '.join(event.new)}")
    if event.start:
        assert plan.resume is not None
        out.say(f"going on from step {count(event.start)} ({plan.resume.label})")


def _say_saved(out: "Output", plan: "Plan", event: "Saved") -> None:
    out.detail(
        f"{plan.checkpoint_ref} @{event.commit.id.short}: step {count(event.step)}, "
        f"{size(event.commit.stored)} stored in {duration(event.seconds)}"
    )


def _as_json(plan: "Plan", trained: "Trained") -> "dict[str, Json]":
    rate = trained.tokens_per_second
    return {
        "id": str(trained.id),
        "ref": str(trained.ref),
        "kind": plan.kind,
        "step": trained.step,
        "loss": trained.loss,
        "tokens": trained.tokens,
        "tokens_per_second": None if rate is None else round(rate, 1),
        "checkpoint": None if trained.checkpoint is None else str(trained.checkpoint),
        "log": None if trained.log is None else str(trained.log),
        "unchanged": trained.unchanged,
    }


def _show(out: "Output", plan: "Plan", trained: "Trained") -> None:
    verb = "was made before:" if trained.unchanged else "is"
    rate = "" if trained.tokens_per_second is None else f", {count(round(trained.tokens_per_second))} tokens/s"
    out.line(
        f"{plan.kind} {trained.ref} @{trained.id.short} {verb} step {count(trained.step)}, loss {trained.loss:.4f}, "
        f"{count(trained.tokens)} tokens{rate}"
    )
    if trained.checkpoint is not None:
        out.line(f"checkpoint {plan.checkpoint_ref} @{trained.checkpoint.short}")
    if trained.log is not None:
        out.say(f"metrics: {trained.log}")
    out.hint(f"llmos eval {plan.label} --data {plan.data_label}")
    if plan.kind == "adapter":
        out.hint(f"llmos merge {plan.label} {trained.ref.name}-merged")
        return
    if plan.data.meta.get("task") in ("lm", "chat"):
        out.hint(f"llmos quantize {plan.label} {trained.ref.name}-int8")
        out.hint(f"llmos serve {plan.label}")
