"""Capacity of a cluster for workers: reservations, and the nodes that are about to be taken away.

A worker's place is a Ray placement group of its resources. So Ray itself counts other jobs and draining or dead nodes,
and an autoscaler sees the places that are still missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .ray_private import abandoned_reservations, draining_nodes


class PlacementReservation:
    """A request for places for workers; each is held from when it becomes free until `release`."""

    def __init__(self, resources: Mapping[str, float], places: int) -> None:
        """`resources`: of one worker. `places`: how many are requested."""
        from ray.util.placement_group import placement_group

        self._groups = [placement_group([dict(resources)]) for _ in range(places)]

    def ready(self) -> int:
        """Count the places that are held on nodes without a drain notice."""
        if not self._groups:
            return 0
        from ray.util import placement_group_table

        table: Any = placement_group_table()
        draining = draining_nodes()
        ready = 0
        for group in self._groups:
            entry = table.get(group.id.hex(), {})
            nodes = set(entry.get("bundles_to_node_id", {}).values())
            ready += entry.get("state") == "CREATED" and not nodes & draining.keys()
        return ready

    def release(self) -> None:
        """Give up all places, held and missing ones."""
        from ray.util import remove_placement_group

        groups, self._groups = self._groups, []
        for group in groups:
            remove_placement_group(group)


def release_abandoned() -> int:
    """Give up the places that actors of this job have reserved and left behind when they ended; returns how many."""
    from ray.util import remove_placement_group

    groups = abandoned_reservations()
    for group in groups:
        remove_placement_group(group)
    return len(groups)


def places_on(nodes: Iterable[Mapping[str, float]], resources: Mapping[str, float]) -> int:
    """Count the workers, each taking `resources`, that fit on otherwise idle nodes with these total resources."""
    needed = {name: amount for name, amount in resources.items() if amount > 0}
    return sum(min(int(node.get(name, 0.0) / amount + 1e-9) for name, amount in needed.items()) for node in nodes)


def cluster_nodes() -> list[dict[str, float]]:
    """Total resources of every living node of the cluster."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def node_resources() -> dict[str, float]:
    """Total resources of this process's node."""
    import ray

    here = this_node()
    return next(node["Resources"] for node in ray.nodes() if node["NodeID"] == here)


def this_node() -> str:
    """Id of this process's node."""
    import ray

    return ray.get_runtime_context().get_node_id()
