"""What other programs and machines compute with, so that a model they cannot run is refused before it is made.

Read from their sources (transformers 5, vLLM 0.28, llama.cpp of 2026), not tried but for transformers and llama.cpp:

| for | int8 | int4 | w8a8 | fp8 | embedding and head |
|---|---|---|---|---|---|
| transformers | unpacked when loaded | unpacked | unpacked | unpacked | in 8 bits |
| vllm | no: 8 bits without those of inputs it reads packed only | yes | yes | yes | as they were |
| llama.cpp | as Q8_0 | as Q4_0 | no: it rounds inputs itself | no | in 8 bits |
| cpu | yes | yes | yes | no: by float32 | in 8 bits |
| h100 | no: slower than bf16 | yes | yes | yes | as they were |
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from llmos_cli.errors import UsageError


@dataclass(frozen=True)
class Target:
    """`schemes`, the one to propose first; `why` not the others; `plain_ends`: the embedding and the head stay as they
    were, and so does a layer that cannot take the form."""

    schemes: tuple[str, ...]
    why: Mapping[str, str]
    plain_ends: bool = False


TARGETS: Final[Mapping[str, Target]] = {
    "transformers": Target(("int8", "int4", "w8a8", "fp8"), {}),
    "vllm": Target(("w8a8", "fp8", "int4"), {"int8": "it runs 8-bit weights only with inputs of 8 bits"}, True),
    "llama.cpp": Target(
        ("int8", "int4"), {"w8a8": "it rounds inputs to 8 bits by itself", "fp8": "its files have no such type"}
    ),
    "cpu": Target(("int8", "int4", "w8a8"), {"fp8": "processors have no such arithmetic"}),
    "h100": Target(("fp8", "w8a8", "int4"), {"int8": "8-bit weights alone are slower there than bf16"}, True),
}


def scheme_for(name: str, scheme: str | None) -> str:
    """The scheme that was asked for, or the target's first; raises UsageError for one that has no kernel there."""
    target = TARGETS[name]
    if scheme is None:
        return target.schemes[0]
    if scheme not in target.schemes:
        raise UsageError(
            f"{scheme} is not for {name}: {target.why[scheme]}", hint=f"use --scheme {' or '.join(target.schemes)}"
        )
    return scheme
