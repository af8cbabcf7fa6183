"""Which workers a cluster has room for, and what is missing for more. Pure.

A worker needs all of its resources on one node, so what is free is counted node by node.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

Resources = Mapping[str, float]


def fitting(nodes: Iterable[Resources], each: Resources) -> int:
    """Return how many workers find room.

    Args:
        nodes: what each node has to give.
        each: what a worker needs.
    """
    wanted = {k: v for k, v in each.items() if v > 0}
    return sum(
        min((int(node.get(k, 0) / v + 1e-9) for k, v in wanted.items()), default=1)
        for node in nodes
    )


def less_a_cpu(nodes: Sequence[Resources]) -> list[Resources]:
    """Return what is left if something else takes a CPU of the node that has most of them."""
    taken = max(range(len(nodes)), key=lambda i: nodes[i].get("CPU", 0), default=-1)
    return [
        {**node, "CPU": max(0.0, node.get("CPU", 0) - 1)} if i == taken else node
        for i, node in enumerate(nodes)
    ]


def missing(
    wanted: int, each: Resources, free: Sequence[Resources], whole: Sequence[Resources]
) -> str:
    """Say what is missing for so many workers: which resource, and how much the cluster has.

    Args:
        wanted: workers.
        each: what a worker needs.
        free: what each node can give now.
        whole: what each node has when nobody else uses it.
    """
    needs = {k: v for k, v in each.items() if v > 0}
    says = f"{wanted} workers need {_words(needs)} each, there is room for {fitting(free, each)}"
    lacks = [
        f"{name}: {wanted * need:g} needed, {_sum(free, name):g} free of {_sum(whole, name):g}"
        for name, need in needs.items()
        if _sum(free, name) < wanted * need
    ]
    if lacks:
        says += f" ({'; '.join(lacks)})"
    most = fitting(whole, each)
    if most == 0:
        largest = {k: max((n.get(k, 0.0) for n in whole), default=0.0) for k in needs}
        says += f"; no node could hold even one, the most that any node has is {_words(largest)}"
    elif most < wanted:
        says += f"; with nobody else on it the cluster would hold {most}"
    elif not lacks:
        says += "; what is free is spread over nodes in parts too small for a worker"
    return says


def _sum(nodes: Iterable[Resources], name: str) -> float:
    return sum(node.get(name, 0.0) for node in nodes)


def _words(resources: Resources) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
