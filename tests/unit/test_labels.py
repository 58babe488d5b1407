from __future__ import annotations

from ipdiverse.labels import apart


def test_labels_keep_their_distance_and_both_ends() -> None:
    assert apart([0.0, 0.01, 0.2, 0.22, 0.6, 0.98, 1.0]) == [0, 2, 4, 6]
    assert apart([0.0, 0.5, 1.0]) == [0, 1, 2]
    assert apart([3.0]) == [0]
    assert apart([]) == []
