"""A tree drawn with lines, or with ASCII where a stream cannot show lines."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Node = TypeVar("Node")


def tree_lines(
    root: Node, text: Callable[[Node], str], children: Callable[[Node], Sequence[Node]], *, plain: bool
) -> Iterator[str]:
    """The lines of a tree, depth first. `children` is asked in the order of the lines, once a node.

    Needs no recursion, so a lineage of thousands of runs can be drawn.
    """
    tee, corner, pipe = ("|- ", "`- ", "|  ") if plain else ("├─ ", "└─ ", "│  ")
    waiting: list[tuple[Node, str, str]] = [(root, "", "")]
    while waiting:
        node, lead, below = waiting.pop()
        yield lead + text(node)
        below_nodes = children(node)
        last = len(below_nodes) - 1
        for index in range(last, -1, -1):
            mark, rest = (corner, "   ") if index == last else (tee, pipe)
            waiting.append((below_nodes[index], below + mark, below + rest))
