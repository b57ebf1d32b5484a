"""What a model ends in, and so what it is for: the class that transformers has for a configuration and a head."""

from typing import Final, Literal

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)

from llmos_cli.errors import LlmosError

Head = Literal["causal", "masked", "classify", "seq2seq"]

_CLASSES: Final = {
    "causal": MODEL_FOR_CAUSAL_LM_MAPPING,
    "masked": MODEL_FOR_MASKED_LM_MAPPING,
    "classify": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "seq2seq": MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
}
_CANNOT: Final = {
    "causal": "does not predict next tokens, so llmos cannot run it",
    "masked": "does not fill in masked tokens",
    "classify": "does not classify texts",
    "seq2seq": "does not turn one text into another",
}
_FOR_PEOPLE: Final = {"classify": "classifies texts", "seq2seq": "turns one text into another"}


def model_class(config: PretrainedConfig, head: Head = "causal") -> type[PreTrainedModel]:
    """The class with this head for this configuration; raises LlmosError where transformers has none."""
    if type(config) not in _CLASSES[head]:
        raise LlmosError(f"a {config.model_type} model {_CANNOT[head]}")
    cls: type[PreTrainedModel] = _CLASSES[head][type(config)]
    return cls


def head_of(config: PretrainedConfig) -> Head:
    """The head that a stored model has, by the class its configuration names; causal where it names none of ours."""
    named = set(getattr(config, "architectures", None) or ())
    for head in ("causal", "classify", "seq2seq", "masked"):
        if type(config) in _CLASSES[head] and _CLASSES[head][type(config)].__name__ in named:
            return head
    return "causal"


def check_head(config: PretrainedConfig, head: Head) -> None:
    """Raise LlmosError for a stored model whose own head is for something else, rather than say that weights miss."""
    own = head_of(config)
    if head == "causal" and own in _FOR_PEOPLE:
        raise LlmosError(
            f"a {model_class(config, own).__name__} {_FOR_PEOPLE[own]}; it does not write on",
            hint="llmos eval REF --data DATASET measures it",
        )
