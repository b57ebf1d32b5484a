import math

import pytest

from llmos_cli.errors import Damaged, Unsafe, UsageError
from llmos_cli.train.config import (
    Options,
    TrainConfig,
    default_save_every,
    differences,
    from_params,
    parse_model_config,
    resolve,
)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("steps", -5),
        ("steps", True),
        ("batch", 0),
        ("lr", 0.0),
        ("lr", -1e-3),
        ("lr", math.nan),
        ("lr", math.inf),
        ("clip", -1.0),
        ("clip", math.nan),
        ("weight_decay", math.inf),
        ("accumulate", 0),
        ("accumulate", 3),
        ("accumulate", 16),
        ("warmup", -1),
        ("warmup", 11),
        ("seed", -1),
        ("seed", 2**32),
        ("depth", 0),
        ("depth", 1000),
        ("precision", "fp16"),
        ("precision", "int4"),
    ],
)
def test_what_cannot_be_trained_is_refused(field: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"--{field.replace('_', '-')}") as caught:
        TrainConfig(**({"steps": 10, "batch": 8, "lr": 1e-3, "depth": 1} | {field: value}))
    assert caught.value.exit_code == 2


def test_fp16_says_what_to_use_instead() -> None:
    with pytest.raises(UsageError, match="CPU") as caught:
        TrainConfig(10, 8, 1e-3, precision="fp16")
    assert "bf16" in (caught.value.hint or "")


def test_accumulate_must_divide_and_says_what_does() -> None:
    with pytest.raises(UsageError) as caught:
        TrainConfig(10, 18, 1e-3, accumulate=4)
    assert caught.value.hint == "use one of 1, 2, 3, 6, 9, 18"


@pytest.mark.parametrize(
    "config", [TrainConfig(10, 8, 1e-3, depth=2), TrainConfig(9, 4, 0.1, config={"a": [1]}, seed=7)]
)
def test_params_read_back(config: TrainConfig) -> None:
    assert from_params(config.params(), config.seed, "x") == config


def test_foreign_params_are_damaged() -> None:
    with pytest.raises(Damaged, match="run:checkpoint"):
        from_params({"bits": 8}, 0, "run:checkpoint")
    with pytest.raises(Damaged):
        from_params({"steps": 3}, 0, "run:checkpoint")


def test_defaults() -> None:
    config = resolve(Options(steps=50), from_model=False)
    assert (config.depth, config.batch, config.warmup, config.precision, config.seed) == (2, 8, 5, "fp32", 0)
    tuned = resolve(Options(steps=50), from_model=True)
    assert tuned.from_model
    assert tuned.lr < config.lr


@pytest.mark.parametrize(
    ("options", "from_model"),
    [(Options(depth=2, config={"model_type": "llama"}), False), (Options(depth=2), True), (Options(config={}), True)],
)
def test_two_sources_are_refused(options: Options, from_model: bool) -> None:
    with pytest.raises(UsageError, match="both say"):
        resolve(options, from_model=from_model)


def test_resume_takes_what_was_not_typed_from_the_checkpoint() -> None:
    recorded = TrainConfig(99, 6, 0.25, precision="bf16", seed=5, accumulate=3, warmup=7, depth=3)
    assert resolve(Options(), from_model=False, recorded=recorded) == recorded
    changed = resolve(Options(lr=0.5), from_model=False, recorded=recorded)
    assert differences(changed, recorded) == ["lr (0.5 asked, 0.25 in the checkpoint)"]


def test_saving_more_often_is_not_part_of_the_recipe() -> None:
    assert "save_every" not in TrainConfig(10, 8, 1e-3).params()
    assert [default_save_every(steps) for steps in (5, 200, 10**6)] == [10, 20, 1000]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (b"{", UsageError),
        (b"[]", UsageError),
        (b'{"vocab_size": 3}', UsageError),
        (b'{"model_type": "x", "auto_map": {"AutoModel": "evil.py"}}', Unsafe),
        (b'{"model_type": "x", "quantization_config": {"bits": 4}}', UsageError),
        (b'{"model_type": "x", "model_type": "y"}', UsageError),
    ],
)
def test_config_json_that_cannot_be_trained(text: bytes, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"config\.json"):
        parse_model_config(text, "config.json")
