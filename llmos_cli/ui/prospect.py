"""How `train --plan` shows what a run would take: tables for a person, and the same as JSON."""

from typing import TYPE_CHECKING

from llmos_cli.ui.text import count, plural, size

if TYPE_CHECKING:
    from llmos_cli.formats.canonical import Json
    from llmos_cli.train.parallel.resources import Layout, Prospect
    from llmos_cli.train.plan import Plan
    from llmos_cli.ui.output import Output


def show_prospect(out: "Output", plan: "Plan", found: "Prospect") -> None:
    """Print it; nothing is trained."""
    resources, need, config = found.resources, found.asked.need, plan.config
    cards = [f"{card.name} with {size(card.memory)} free" for card in resources.devices]
    line = out.line
    processor = f"processor, {plural(resources.cores, 'core')}"
    line(f"devices     {', '.join(cards) or processor}")
    line(f"memory      {size(resources.memory)} free")
    line(f"disk        {size(resources.disk)} free; a checkpoint takes at most {size(found.checkpoint)}")
    line(f"model       {count(found.shape.parameters)} parameters, {plural(found.shape.layers, 'layer')}")
    line(f"steps       {count(plan.start)} to {count(config.steps)}, {count(config.batch)} rows each")
    line(f"one process {size(need.total)}, about:")
    for name in ("weights", "gradients", "optimizer", "activations", "copy", "libraries"):
        line(f"  {_WORDS.get(name, name):<18} {size(getattr(need, name)):>10}")
    if found.proposed is None:
        line("layout      none fits: a smaller model, shorter rows or more memory would")
    elif found.proposed == found.asked:
        line("layout      as asked for: it fits")
    else:
        line(f"layout      {found.proposed.options} ({size(found.proposed.need.total)} a process)")


def prospect_json(plan: "Plan", found: "Prospect") -> "dict[str, Json]":
    """The same as values."""
    resources = found.resources
    return {
        "ref": str(plan.target),
        "resources": {
            "devices": [{"name": card.name, "memory": card.memory} for card in resources.devices],
            "cores": resources.cores,
            "memory": resources.memory,
            "disk": resources.disk,
        },
        "parameters": found.shape.parameters,
        "checkpoint": found.checkpoint,
        "start": plan.start,
        "steps": plan.config.steps,
        "asked": _layout_json(found.asked),
        "proposed": None if found.proposed is None else _layout_json(found.proposed),
    }


_WORDS = {"copy": "checkpoint's copy", "optimizer": "optimizer state"}


def _layout_json(layout: "Layout") -> "dict[str, Json]":
    need = layout.need
    parts = ("weights", "gradients", "optimizer", "activations", "copy", "libraries", "total")
    return {
        "options": layout.options,
        "processes": layout.processes,
        "accumulate": layout.accumulate,
        "precision": layout.precision,
        "fits": layout.fits,
        "bytes": {name: getattr(need, name) for name in parts},
    }
