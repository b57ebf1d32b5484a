"""Giving a store a ref's log back as it was: the same moves, with their numbers, times and people.

A ref that is not there appears with its whole log at once: the folder is made elsewhere and renamed. The log of one
that is there only grows, one move after the other; and it is trimmed, of moves that have been followed by others.
"""

from collections.abc import Sequence

from llmos_cli.errors import Conflict, LlmosError
from llmos_cli.formats.names import RefName
from llmos_cli.formats.reflog import RefEntry, encode_entry, entry_name
from llmos_cli.store.disk import durable
from llmos_cli.store.handle import Store
from llmos_cli.store.refs.refs import publish_move, read_ref, ref_history


def restore_log(store: Store, ref: RefName, moves: Sequence[RefEntry]) -> None:
    """Make a ref with these moves; raises Conflict if it is there meanwhile."""
    target = store.refs / ref.name / ref.tag
    temp = durable.temp_path(store.tmp)
    durable.make_folder(temp)
    try:
        for move in moves:
            with durable.new_file(temp / entry_name(move.sequence)) as file:
                durable.write_all(file, encode_entry(move))
        durable.sync_folder(temp)
        durable.make_folder(target.parent)
        durable.move(temp, target)
    except LlmosError:
        durable.remove_tree(temp)
        if read_ref(store, ref):
            raise Conflict(f"ref {ref} has been made meanwhile", hint=f"look at it: llmos log {ref}") from None
        raise


def extend_log(store: Store, moves: Sequence[RefEntry]) -> None:
    """Add the moves that follow a ref's newest one; raises Conflict if somebody else moves it."""
    for move in moves:
        publish_move(store, move)


def trim_log(store: Store, ref: RefName, moves: Sequence[RefEntry]) -> None:
    """Forget these moves of a ref, so that its log no longer keeps what they named; never its newest one."""
    newest = next(iter(ref_history(store, ref)), None)
    folder = store.refs / ref.name / ref.tag
    gone = [move for move in moves if newest is not None and move.sequence < newest.sequence]
    for move in gone:
        durable.remove(folder / entry_name(move.sequence))
    if gone:
        durable.sync_folder(folder)
