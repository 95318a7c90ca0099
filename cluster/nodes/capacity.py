"""Where workers can run: places held on the cluster, and nodes that are about to be taken away.

Ray itself says what fits where: a place is a placement group of one worker's resources. So other jobs, draining and
dead nodes are counted as Ray counts them, and an autoscaler sees the places that are still wanted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .ray_private import draining_nodes


class Room:
    """Places for workers, taken as they become free and held until `release`."""

    def __init__(self, resources: Mapping[str, float], places: int) -> None:
        """`resources`: of one worker. `places`: how many are wanted."""
        from ray.util.placement_group import placement_group

        self._groups = [placement_group([dict(resources)]) for _ in range(places)]

    def held(self) -> int:
        """How many places are there now, on nodes that stay."""
        if not self._groups:
            return 0
        from ray.util import placement_group_table

        table: Any = placement_group_table()
        leaving = draining_nodes()
        held = 0
        for group in self._groups:
            entry = table.get(group.id.hex(), {})
            nodes = set(entry.get("bundles_to_node_id", {}).values())
            held += entry.get("state") == "CREATED" and not nodes & leaving.keys()
        return held

    def release(self) -> None:
        """Give all places back, and want no more."""
        from ray.util import remove_placement_group

        groups, self._groups = self._groups, []
        for group in groups:
            remove_placement_group(group)


def places_on(nodes: Iterable[Mapping[str, float]], resources: Mapping[str, float]) -> int:
    """How many workers that take `resources` fit on nodes that have these in all, when nothing else runs there."""
    needed = {name: amount for name, amount in resources.items() if amount > 0}
    room = (min(int(node.get(name, 0.0) / amount + 1e-9) for name, amount in needed.items()) for node in nodes)
    return sum(room)


def cluster_nodes() -> list[dict[str, float]]:
    """What every living node of the cluster has in all."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def node_resources() -> dict[str, float]:
    """What the node of this process has in all."""
    import ray

    here = this_node()
    return next(node["Resources"] for node in ray.nodes() if node["NodeID"] == here)


def this_node() -> str:
    """Id of the node that this process runs on."""
    import ray

    return ray.get_runtime_context().get_node_id()
