"""How people and programs are told who has signed a ref."""

from typing import TYPE_CHECKING, Any

from llmos_cli.ui.text import safe_line

if TYPE_CHECKING:
    from llmos_cli.store.refs.signatures import Signed

_DIGITS = 16  # of a key that has no name here


def signer_text(item: "Signed") -> str:
    """ "alice", "alice (expired)", "an unknown key 3f2a..."."""
    statement = item.signature and item.signature.statement
    name = safe_line(item.name) if item.name else None
    if item.state == "good":
        until = f", until {statement.expires}" if statement and statement.expires else ""
        return f"{name}{until}"
    key = f" {item.signature.key[:_DIGITS]}" if item.signature else ""
    who = name or f"an unknown key{key}"
    if item.state == "unknown":
        return who
    return f"{who} ({item.state}: {item.why})" if item.why else f"{who} ({item.state})"


def signer_json(item: "Signed") -> dict[str, Any]:
    statement = item.signature and item.signature.statement
    return {
        "state": item.state,
        "name": item.name,
        "key": item.signature.key if item.signature else None,
        "serial": statement.serial if statement else None,
        "time": statement.time if statement else None,
        "expires": statement.expires if statement else None,
        "why": item.why or None,
    }
