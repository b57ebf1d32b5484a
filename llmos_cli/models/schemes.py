"""How the weights of a quantized model lie in its files, in the words of compressed-tensors (version 0.20).

A form says how a weight is stored and computed with; a scheme says which modules take which form. In config.json a
scheme is one config group a form: `targets` are module classes or module names (a name counts before a class), `ignore`
the modules of those classes that stay as they were.

| form | tensors of a module X | value |
|---|---|---|
| int8, w8a8 | `X.weight` I8 [rows, columns], `X.weight_scale` [rows, 1] | weight * scale |
| int4 | `X.weight_packed` I32 [rows, columns / 8], `X.weight_scale` [rows, columns / group], `X.weight_shape` I64 [2] | (nibble - 8) * scale, lowest nibble first; a scale may be negative |
| fp8 | `X.weight` F8_E4M3 [rows, columns], `X.weight_scale` [rows, 1] | weight * scale |

w8a8 and fp8 also quantize what goes into a layer, token by token, while it computes. Tied modules share the weight and
have a scale tensor each, as readers of that vocabulary expect. One thing it has no word for stands under the key
"llmos": Conv1D weights, which their class keeps as [in, out], lie as [out, in] (`transposed`).
"""  # noqa: E501 - a table

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from llmos_cli.errors import LlmosError

CONV1D: Final = "Conv1D"
CLASSES: Final = frozenset({"Linear", "Embedding", CONV1D})
_MIXED: Final = "mixed-precision"


@dataclass(frozen=True)
class Form:
    """`bits` of a weight; `group` columns share a scale, a whole row if 0; `packed` into 32-bit words; `dynamic`: what
    goes into the layer is quantized too."""

    name: str
    bits: int
    kind: str
    group: int = 0
    packed: bool = False
    dynamic: bool = False

    @property
    def label(self) -> str:
        """For people: "int8", "int4 in 32s"."""
        return f"{self.name} in {self.group}s" if self.group else self.name

    @property
    def layout(self) -> str:
        return "pack-quantized" if self.packed else f"{self.kind}-quantized"

    def config(self) -> dict[str, Any]:
        """The config group that says it, without its targets."""
        weights: dict[str, Any] = {"num_bits": self.bits, "type": self.kind, "symmetric": True, "dynamic": False}
        weights |= {"strategy": "group", "group_size": self.group} if self.group else {"strategy": "channel"}
        table: dict[str, Any] = {"weights": weights, "format": self.layout}
        if self.dynamic:
            table["input_activations"] = {
                "num_bits": self.bits, "type": self.kind, "symmetric": True, "dynamic": True, "strategy": "token",
            }  # fmt: skip
        return table


INT8: Final = Form("int8", 8, "int")
W8A8: Final = Form("w8a8", 8, "int", dynamic=True)
FP8: Final = Form("fp8", 8, "float", dynamic=True)
GROUPS: Final = (32, 64, 128)


def int4(group: int = 32) -> Form:
    """Four bits a weight, a scale for every `group` columns of a row."""
    return Form("int4", 4, "int", group=group, packed=True)


KNOWN: Final = (INT8, W8A8, FP8, *(int4(group) for group in GROUPS))


@dataclass(frozen=True)
class Scheme:
    """Which modules of a model hold quantized weights: the targets of each form but for the names in `ignore`."""

    forms: Mapping[Form, frozenset[str]]
    ignore: frozenset[str]

    def form_of(self, name: str, kind: str) -> Form | None:
        """The form of a module by its name and the name of its class; None if it stays as it was."""
        if name in self.ignore:
            return None
        for wanted in (name, kind):
            for form, targets in self.forms.items():
                if wanted in targets:
                    return form
        return None

    @property
    def targets(self) -> frozenset[str]:
        return frozenset().union(*self.forms.values())

    def config(self) -> dict[str, Any]:
        """The `quantization_config` that says it in config.json."""
        layouts = {form.layout for form in self.forms}
        config: dict[str, Any] = {
            "quant_method": "compressed-tensors",
            "format": layouts.pop() if len(layouts) == 1 else _MIXED,
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{number}": {"targets": sorted(targets), **form.config()}
                for number, (form, targets) in enumerate(self.forms.items())
            },
            "ignore": sorted(self.ignore),
        }
        if CONV1D in self.targets:
            config["llmos"] = {"transposed": [CONV1D]}
        return config


def read_scheme(quantization: Any) -> Scheme:
    """Read a `quantization_config`; raises LlmosError for every scheme but ours."""
    try:
        groups = quantization["config_groups"]
        forms = {_form(group): frozenset(group["targets"]) for _, group in sorted(groups.items())}
        scheme = Scheme(forms, frozenset(quantization["ignore"]))
        if quantization == scheme.config():
            return scheme
    except (TypeError, KeyError, AttributeError, StopIteration):
        pass
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    raise LlmosError(
        f"the model is quantized in a way that llmos cannot run ({str(method)[:40]})",
        hint="take the unquantized model and run llmos quantize REF NAME --scheme int8",
    )


def _form(group: Mapping[str, Any]) -> Form:
    said = {key: value for key, value in group.items() if key != "targets"}
    return next(form for form in KNOWN if form.config() == said)
