"""How many workers fit on a cluster's nodes: counted node by node, by the scarcest resource."""

from __future__ import annotations

import pytest
from glann.cluster.nodes.capacity import places_on

BIG, SMALL, BARE = {"CPU": 16.0, "GPU": 4.0}, {"CPU": 4.0, "GPU": 1.0}, {"CPU": 8.0}


@pytest.mark.parametrize(
    ("nodes", "resources", "places"),
    [
        ([BARE], {"CPU": 1.0}, 8),
        ([BIG, SMALL, BARE], {"CPU": 2.0}, 14),
        ([BIG, SMALL, BARE], {"CPU": 1.0, "GPU": 1.0}, 5),
        ([BIG, SMALL], {"CPU": 8.0, "GPU": 1.0}, 2),  # cores are what is scarce
        ([{"CPU": 3.0}, {"CPU": 3.0}], {"CPU": 2.0}, 2),  # what is left of two nodes makes no third
        ([BIG, BARE], {"CPU": 1.0, "GPU": 0.0}, 24),  # none is asked for
        ([BIG], {"CPU": 1.0, "GPU": 0.5}, 8),
        ([SMALL], {"CPU": 0.5, "GPU": 0.25}, 4),
        ([{"CPU": 0.7}], {"CPU": 0.1}, 7),  # 0.7 / 0.1 is a little less than 7 in floats
        ([{"GPU": 1.0}], {"GPU": 0.3}, 3),
        ([BARE], {"GPU": 1.0}, 0),
        ([SMALL], {"CPU": 5.0}, 0),
        ([], {"CPU": 1.0}, 0),
        ([{}], {"CPU": 1.0}, 0),
    ],
)
def test_places(nodes: list[dict[str, float]], resources: dict[str, float], places: int):
    assert places_on(nodes, resources) == places
