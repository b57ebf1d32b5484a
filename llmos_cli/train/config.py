"""What a training run is asked to do, checked in full before anything heavy is loaded.

Everything in a `TrainConfig` decides the bytes of the result, so all of it goes into the recipe. What only decides how
often work is saved (`--save-every`) is not in here. Stdlib only: it knows nothing of torch, devices or the store.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from llmos_cli.errors import Damaged, Unsafe, UsageError
from llmos_cli.formats import canonical
from llmos_cli.formats.canonical import Json
from llmos_cli.train.method import DEFAULTS, check_method

PRECISIONS: Final = ("fp32", "bf16")
SKIPPED: Final = "skip_steps"
ALLOWED: Final = ("data", "config")  # in what a resumed run may differ from its checkpoint, if it is said
EVAL: Final = "eval_"  # begins the names of the scores of a split set aside
FALLING: Final = ("loss", "eval_loss", "eval_perplexity")  # metrics of which less is better
METRICS: Final = (*FALLING, "eval_accuracy", "eval_macro_f1", "eval_pearson")  # what --keep-best can go by
DEFAULT_DEPTH: Final = 2
LR_FROM_SCRATCH: Final = 1e-3
LR_FROM_MODEL: Final = 5e-5
MOST_STEPS: Final = 1_000_000_000
MOST_ROWS: Final = 1_000_000  # rows of a global batch
MOST_DEPTH: Final = 128
SEEDS: Final = 2**32  # numpy's seeds end here
_SPAN = re.compile(r"(?P<first>[0-9]{1,10})(?:-(?P<last>[0-9]{1,10}))?\Z")

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Options:
    """What the user typed; None is "not said", so that `--resume` can take it from the checkpoint."""

    steps: int | None = None
    batch: int | None = None
    lr: float | None = None
    precision: str | None = None
    seed: int | None = None
    accumulate: int | None = None
    warmup: int | None = None
    clip: float | None = None
    weight_decay: float | None = None
    depth: int | None = None
    config: Mapping[str, Json] | None = None
    skip_steps: Spans | None = None
    optimizer: str | None = None
    schedule: str | None = None
    ema: float | None = None
    checkpointing: bool | None = None
    compile: bool | None = None
    lora: int | None = None
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] | None = None


@dataclass(frozen=True)
class TrainConfig:
    """The resolved configuration of a run; `depth` and `config` are None when it starts from a model ref. `skip_steps`
    are runs of steps, from the first to the last counted from 1, that are passed over."""

    steps: int
    batch: int
    lr: float
    precision: str = "fp32"
    seed: int = 0
    accumulate: int = 1
    warmup: int = 0
    clip: float = 1.0
    weight_decay: float = 0.1
    depth: int | None = None
    config: Mapping[str, Json] | None = None
    skip_steps: Spans = ()
    optimizer: str = "adamw"
    schedule: str = "cosine"
    ema: float | None = None
    checkpointing: bool = False
    compile: bool = False
    lora: int | None = None
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _whole("--steps", self.steps, 1, MOST_STEPS)
        _whole("--batch", self.batch, 1, MOST_ROWS)
        _whole("--accumulate", self.accumulate, 1, MOST_ROWS)
        _whole("--seed", self.seed, 0, SEEDS - 1)
        _whole("--warmup", self.warmup, 0, self.steps)
        if self.depth is not None:
            _whole("--depth", self.depth, 1, MOST_DEPTH)
        for first, last in self.skip_steps:
            _whole("--skip-steps", first, 1, self.steps)
            _whole("--skip-steps", last, first, self.steps)
        if self.skip_steps == ((1, self.steps),):
            raise UsageError(f"--skip-steps passes over all {self.steps:,} steps", hint="leave some to take")
        _number("--lr", self.lr, positive=True)
        _number("--clip", self.clip, positive=False)
        _number("--weight-decay", self.weight_decay, positive=False)
        if self.batch % self.accumulate:
            divisors = [str(n) for n in range(1, min(self.batch, 64) + 1) if self.batch % n == 0]
            raise UsageError(
                f"--accumulate {self.accumulate} does not divide --batch {self.batch}",
                hint=f"use one of {', '.join(divisors)}",
            )
        if self.precision not in PRECISIONS:
            raise UsageError(
                f"--precision {self.precision} is not offered" + _why_not(self.precision),
                hint="use --precision bf16 or --precision fp32",
            )
        if self.depth is not None and self.config is not None:
            raise UsageError("--depth and --config both say what to build", hint="give one of them")
        check_method({name: getattr(self, name) for name in DEFAULTS}, from_model=self.from_model)

    @property
    def from_model(self) -> bool:
        return self.depth is None and self.config is None

    @property
    def schedule_taken(self) -> str:
        """The schedule; schedule-free AdamW does without one."""
        return "constant" if self.optimizer == "schedule-free" else self.schedule

    def params(self) -> dict[str, Json]:
        """The recipe's parameters; the seed has a place of its own there."""
        table: dict[str, Json] = {
            "accumulate": self.accumulate,
            "batch": self.batch,
            "clip": self.clip,
            "lr": self.lr,
            "precision": self.precision,
            "steps": self.steps,
            "warmup": self.warmup,
            "weight_decay": self.weight_decay,
        }
        if self.depth is not None:
            table["depth"] = self.depth
        if self.config is not None:
            table["config"] = dict(self.config)
        if self.skip_steps:
            table[SKIPPED] = [list(span) for span in self.skip_steps]
        for name, default in DEFAULTS.items():  # left out where nothing was chosen, so that ids stay
            if (value := getattr(self, name)) != default:
                table[name] = list(value) if isinstance(value, tuple) else value
        return table

    def skips(self, step: int) -> bool:
        """Whether a step, counted from 1, is passed over."""
        return any(first <= step <= last for first, last in self.skip_steps)


@dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept besides the newest: the `last` few, the weights of `every` so many steps, those with
    the `best` value of a metric. None is "not asked for"; nothing of it decides the bytes of a result."""

    last: int | None = None
    every: int | None = None
    best: str | None = None

    def __post_init__(self) -> None:
        if self.last == 1:
            raise UsageError("--keep-last 1 would leave nothing to fall back on", hint="use --keep-last 2")
        if self.last is not None:
            _whole("--keep-last", self.last, 2, MOST_STEPS)
        if self.every is not None:
            _whole("--keep-every", self.every, 1, MOST_STEPS)
        if self.best is not None and self.best not in METRICS:
            raise UsageError(
                f"--keep-best {self.best} is not a metric of a run", hint=f"use one of {', '.join(METRICS)}"
            )


def from_params(params: Mapping[str, Json], seed: int | None, what: str) -> TrainConfig:
    """Read `TrainConfig.params()` back; raises Damaged naming `what` when it is not one."""
    table: dict[str, Any] = dict(params)
    known = {field.name for field in fields(TrainConfig)}
    if set(table) - known or seed is None:
        raise Damaged(f"{what} does not hold the parameters of a training run")
    try:
        if SKIPPED in table:
            table[SKIPPED] = tuple((first, last) for first, last in table[SKIPPED])
        if "lora_targets" in table:
            table["lora_targets"] = tuple(table["lora_targets"])
        return TrainConfig(**table, seed=seed)
    except (TypeError, ValueError, UsageError) as exc:
        raise Damaged(f"{what} does not hold the parameters of a training run: {exc}") from exc


def parse_spans(text: str) -> Spans:
    """Read --skip-steps: "7", "7-9" or several of these with commas between them."""
    spans = []
    for part in text.split(","):
        match = _SPAN.match(part.strip())
        if not match:
            raise UsageError(f"--skip-steps {text} is not A-B", hint="write the steps from A to B as in 120-140")
        first, last = int(match["first"]), int(match["last"] or match["first"])
        if first > last:
            raise UsageError(f"--skip-steps {part.strip()} ends before it begins", hint=f"write {last}-{first}")
        spans.append((first, last))
    return merged(tuple(spans))


def merged(spans: Spans) -> Spans:
    """The same steps in order, in as few runs as it takes."""
    found: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(found[-1][1], last))
        else:
            found.append((first, last))
    return tuple(found)


def clipped(spans: Spans, step: int) -> Spans:
    """Of these steps those up to `step`."""
    return tuple((first, min(last, step)) for first, last in spans if first <= step)


def parse_allowed(text: str) -> tuple[str, ...]:
    """Read --allow: "data", "config" or both with a comma between them."""
    words = tuple(word.strip() for word in text.split(","))
    for word in words:
        if word not in ALLOWED:
            raise UsageError(f"--allow {word} is not offered", hint=f"use --allow {','.join(ALLOWED)} or one of them")
    return words


def resolve(options: Options, *, from_model: bool, recorded: TrainConfig | None = None) -> TrainConfig:
    """The full configuration: what was typed, else what the checkpoint recorded, else the defaults."""
    given = {field.name: value for field in fields(options) if (value := getattr(options, field.name)) is not None}
    source = [name for name in ("depth", "config") if name in given] + (["model"] if from_model else [])
    if len(source) > 1:
        raise UsageError(
            f"{' and '.join('--' + name for name in source)} both say what to train", hint="give one of them"
        )
    if recorded is not None:
        kept = {field.name: getattr(recorded, field.name) for field in fields(recorded)}
        if source:
            kept |= {"depth": None, "config": None}
        if options.skip_steps is not None:
            given[SKIPPED] = merged(recorded.skip_steps + options.skip_steps)
        return TrainConfig(**(kept | given))
    if not source:
        given["depth"] = DEFAULT_DEPTH
    steps = given.setdefault("steps", 1000)
    _whole("--steps", steps, 1, MOST_STEPS)
    given.setdefault("batch", 8)
    given.setdefault("lr", LR_FROM_MODEL if from_model else LR_FROM_SCRATCH)
    given.setdefault("warmup", min(100, steps // 10))
    return TrainConfig(**given)


def default_save_every(steps: int) -> int:
    """About ten checkpoints a run, but neither every few steps nor thousands of steps apart."""
    return min(1000, max(10, steps // 10))


def check_save_every(save_every: int, flag: str = "--save-every") -> int:
    """Refuse a nonsensical --save-every."""
    _whole(flag, save_every, 1, MOST_STEPS)
    return save_every


def parse_model_config(data: bytes, name: str) -> dict[str, Json]:
    """Read a Hugging Face config.json given as --config; refuses remote code and quantized layouts."""
    try:
        table = canonical.loads(data, name)
    except Damaged as exc:
        raise UsageError(exc.message) from exc
    if not isinstance(table, dict) or not isinstance(table.get("model_type"), str):
        raise UsageError(f"{name} names no model_type", hint="give the config.json of a Hugging Face model")
    check_trainable(table, name)
    try:
        canonical.encode(table)
    except ValueError as exc:
        raise UsageError(f"{name} cannot be kept exactly: {exc}") from exc
    return table


def check_trainable(table: Mapping[str, Json], name: str) -> None:
    """Refuse a model config that needs foreign code or describes weights that cannot be trained."""
    if table.get("auto_map"):
        raise Unsafe(f"{name} asks to run code that came with the model (auto_map)")
    if table.get("quantization_config"):
        raise UsageError(f"{name} is quantized, which cannot be trained", hint="train the model it was made from")


def differences(asked: TrainConfig, recorded: TrainConfig) -> list[str]:
    """The fields in which two runs differ, as "lr: 0.001 asked, 0.01 in the checkpoint"."""
    found = []
    for field in fields(TrainConfig):
        ours, theirs = getattr(asked, field.name), getattr(recorded, field.name)
        if ours != theirs:
            found.append(
                field.name
                if isinstance(ours, Mapping | tuple) or isinstance(theirs, Mapping | tuple)
                else f"{field.name} ({ours} asked, {theirs} in the checkpoint)"
            )
    return found


def _why_not(precision: str) -> str:
    return ": it needs loss scaling and does not work on a CPU" if precision == "fp16" else ""


def _whole(flag: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise UsageError(f"{flag} {value} is not a whole number from {low:,} to {high:,}")


def _number(flag: str, value: Any, *, positive: bool) -> None:
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise UsageError(f"{flag} {value} is not a finite number {'above 0' if positive else 'of 0 or more'}")
