"""OpenAssistant's flat messages put together into the trees that they come from.

The Hub's ``OpenAssistant/oasst1`` has one message a row, with its parent's id; the messages of a
tree follow one another. The files that the project publishes have one tree a row instead.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from hydra_rlhf.data.rows import Row

FLAT = ("message_tree_id", "message_id", "parent_id", "role", "text")


def grown(rows: Iterable[Row]) -> Iterator[Row]:
    """Runs of messages of one tree as one row each, shaped as a tree; other rows as they are."""
    for tree, run in itertools.groupby(rows, _tree_of):
        if tree is None:
            yield from run
        else:
            yield _tree(tree, list(run))


def _tree_of(row: Row) -> str | None:
    if row.values is None or any(column not in row.values for column in FLAT):
        return None
    tree = row.values["message_tree_id"]
    return tree if isinstance(tree, str) else None


def _tree(tree: str, rows: list[Row]) -> Row:
    nodes: dict[Any, dict[str, Any]] = {}
    for row in rows:
        message = row.values or {}
        if not isinstance(message["message_id"], str):
            return Row(row.where, None, f"message tree {tree}: a message without an id")
        nodes[message["message_id"]] = {**message, "replies": []}
    root = None
    for node in nodes.values():
        parent = node["parent_id"]
        if parent is None:
            root = root or node
        elif isinstance(parent, str) and parent in nodes:
            nodes[parent]["replies"].append(node)
    if root is None:
        return Row(rows[0].where, None, f"message tree {tree}: no message without a parent")
    return Row(rows[0].where, {"message_tree_id": tree, "prompt": root})
