"""Sets of a study on critters: which pairs are drawn, and how they are scored."""

from __future__ import annotations

import numpy as np

from ipdiverse.critters.oracle import Reading
from ipdiverse.critters.scene import IDENTITY
from ipdiverse.evaluation.pairs import critters_sets, study_pairs
from ipdiverse.evaluation.sets import pair_sums
from tests.captions import parse


def test_a_study_asks_for_edits_and_scores_them_apart() -> None:
    pairs = study_pairs(30, 3, edits=True)
    for pair in pairs:
        stated = [name for name in pair.stated if name in IDENTITY]
        assert len(stated) == 1
        assert pair.stated[stated[0]] != getattr(pair.reference, stated[0])
        assert parse(pair.prompt) == {k: pair.stated[k] for k in parse(pair.prompt)}
    references = np.array([[pair.reference.indices()] * 4 for pair in pairs])
    seen = Reading(references, np.zeros((30, 4), bool))
    parts = pair_sums(critters_sets(seen, pairs))
    assert parts["edit_accuracy"].estimate == 0, "the reference itself shows no edit"
    assert parts["retention"].estimate == 1
    plain = study_pairs(30, 3)
    assert "edit_accuracy" not in pair_sums(critters_sets(seen, plain))
