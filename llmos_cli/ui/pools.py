"""What a pool looks like: its nodes as a table and as JSON, what is wrong with it in words."""

from typing import TYPE_CHECKING, Any, Final

from llmos_cli.ui.session import Session
from llmos_cli.ui.text import count, percent, plural, size

if TYPE_CHECKING:
    from llmos_cli.remote.pool.heal import Healed, HealPlan
    from llmos_cli.remote.pool.pools import PoolRemote
    from llmos_cli.remote.pool.scrub import PackCopies, Survey

_SHOWN: Final = 20


def describe_pool(remote: "PoolRemote", survey: "Survey") -> dict[str, Any]:
    """N packs on M nodes, R copies each: about K = N*R/M a node."""
    nodes = []
    for name, node in _nodes(survey):
        packs, num_bytes = survey.held(name)
        nodes.append(
            {"node": name, "url": node.url, "state": node.state, "why": node.why, "packs": packs, "bytes": num_bytes}
        )
    return {
        "remote": remote.name,
        "url": remote.pool.url,
        "pool": remote.pool.members.pool,
        "epoch": remote.pool.members.epoch,
        "replicas": survey.replicas,
        "packs": len(survey.packs),
        "bytes": survey.num_bytes,
        "refs": survey.refs,
        "packs_a_node": round(_share(survey), 1),
        "nodes": nodes,
    }


def describe_health(survey: "Survey", pending: set[str]) -> dict[str, Any]:
    up = [name for name, node in survey.nodes.items() if node.state == "up"]
    return {
        "healthy": is_healthy(survey, pending),
        "nodes_up": len(up),
        "under_replicated": [str(pack.name) for pack in survey.under_replicated],
        "unreadable": [str(pack.name) for pack in survey.unreadable],
        "damaged": [{"key": key, "node": survey.nodes[node].url, "why": why} for key, node, why in survey.bad()],
        "misplaced": len(survey.misplaced),
        "behind": [survey.nodes[name].url for name in survey.lagging],
        "unfinished": sorted(pending),
    }


def is_healthy(survey: "Survey", pending: set[str]) -> bool:
    everybody = all(node.state == "up" for node in survey.nodes.values()) and len(survey.asked) == len(survey.nodes)
    enough = len(survey.nodes) >= survey.replicas
    return everybody and enough and not (survey.under_replicated or survey.lagging or pending or any(survey.bad()))


def show_pool(here: Session, remote: "PoolRemote", survey: "Survey") -> None:
    rows = []
    total = sum(survey.held(name)[1] for name in survey.nodes)
    for name, node in _nodes(survey):
        packs, num_bytes = survey.held(name)
        state = f"{node.state}: {node.why}" if node.why else node.state
        rows.append([node.url, state, count(packs), size(num_bytes), percent(num_bytes, total)])
    here.out.line(
        f"{remote.label}: {plural(len(survey.packs), 'pack')}, {size(survey.num_bytes)}, "
        f"{plural(survey.refs, 'ref')}; {survey.replicas} copies on {plural(len(survey.nodes), 'node')}, "
        f"about {_share(survey):.0f} packs a node"
    )
    here.out.table(["node", "state", "packs", "size", "share"], rows, right=(2, 3, 4))


def show_health(here: Session, remote: "PoolRemote", survey: "Survey", pending: set[str]) -> None:
    """What is wrong, one line each; nothing where all is well."""
    if survey.misplaced:
        here.out.line(f"{plural(len(survey.misplaced), 'pack')} to be moved: nodes have come or gone")
    if is_healthy(survey, pending):
        here.out.line("all is well" if not survey.misplaced else "all else is well")
        if survey.misplaced:
            here.out.hint(f"llmos remote repair {remote.label}")
        return
    few, none = survey.under_replicated, survey.unreadable
    lines = [
        (few, f"{plural(len(few), 'pack')} with fewer than {survey.replicas} whole copies"),
        (none, f"{plural(len(none), 'pack')} of them without any at the nodes that answer"),
        (survey.lagging, f"{plural(len(survey.lagging), 'node')} behind in refs: {_urls(survey, survey.lagging)}"),
        (pending, f"{plural(len(pending), 'move')} under way or left unfinished"),
        (len(survey.nodes) < survey.replicas, f"fewer nodes than the {survey.replicas} copies need"),
    ]
    for wrong, text in lines:
        if wrong:
            here.out.line(text)
    show_damage(here, survey)
    here.out.hint(f"llmos remote repair {remote.label}")


def show_damage(here: Session, survey: "Survey") -> None:
    found = list(survey.bad())
    for key, node, why in found[:_SHOWN]:
        here.out.line(f"damaged: {key} at {survey.nodes[node].url} {why}")
    if len(found) > _SHOWN:
        here.out.line(f"and {count(len(found) - _SHOWN)} more; --json lists all")


def describe_heal(plan: "HealPlan", done: "Healed | None") -> dict[str, Any]:
    return {
        "dry_run": done is None,
        "read_bytes": plan.survey.read,
        "renewed_nodes": [plan.survey.nodes[name].url for name in plan.renewed],
        "unfinished": list(plan.settled),
        "keys": done.keys if done else len(plan.keys),
        "copies": done.copies if done else plan.copies,
        "copied_bytes": done.copied_bytes if done else plan.copied_bytes,
        "removed_copies": done.removed if done else plan.removals,
        "lost_packs": [str(pack.name) for pack in plan.lost],
        "failed": [{"key": key, "why": why} for key, why in done.failed] if done else [],
    }


def show_heal(here: Session, plan: "HealPlan", done: "Healed | None") -> None:
    would = "would be " if done is None else ""
    copies, num_bytes = (done.copies, done.copied_bytes) if done else (plan.copies, plan.copied_bytes)
    removed, keys = (done.removed, done.keys) if done else (plan.removals, len(plan.keys))
    for name in plan.renewed:
        here.out.line(f"{plan.survey.nodes[name].url} {would}filled and let in again: {plan.survey.nodes[name].why}")
    lines = [
        (plan.settled, f"{plural(len(plan.settled), 'unfinished move')} {would}settled"),
        (
            keys,
            f"{plural(keys, 'move or snapshot') if keys == 1 else f'{count(keys)} moves and snapshots'} {would}copied",
        ),
        (copies, f"{plural(copies, 'pack')} {would}copied ({size(num_bytes)})"),
        (
            removed,
            f"{plural(removed, 'copy') if removed == 1 else f'{count(removed)} copies'} {would}removed: too many",
        ),
    ]
    for number, text in lines:
        if number:
            here.out.line(text)
    for key, why in (done.failed if done else ())[:_SHOWN]:
        here.out.line(f"failed: {key}: {why}")
    if not plan.has_work and not plan.lost:
        here.out.line("nothing to repair")


def _nodes(survey: "Survey") -> list[tuple[str, Any]]:
    return sorted(survey.nodes.items(), key=lambda item: item[1].url)


def _urls(survey: "Survey", names: tuple[str, ...]) -> str:
    return ", ".join(sorted(survey.nodes[name].url for name in names))


def _share(survey: "Survey") -> float:
    return len(survey.packs) * min(survey.replicas, len(survey.nodes)) / len(survey.nodes)


def lost_words(packs: "tuple[PackCopies, ...]") -> str:
    shown = ", ".join(pack.name.short for pack in packs[:3])
    return f"{plural(len(packs), 'pack')} without a whole copy ({shown}{', ...' if len(packs) > 3 else ''})"
