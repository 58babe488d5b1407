"""Differences between arms of a study, pair by pair, from what was read in their images.

    python -m studies.differences paired-none paired-gated paired-blend [--seeds 1]
        [--config studies/variety.toml] [--readings docs/study/readings]

A report compares every arm with the baseline. This compares the first arm that is named with
each of the others, drawn together, so that what pairs have in common cancels.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ipdiverse.errors import DataError
from ipdiverse.evaluation.bootstrap import Difference, difference, holm
from ipdiverse.evaluation.pairs import Pair, critters_sets, study_pairs
from ipdiverse.evaluation.sets import PairSums, pair_sums
from ipdiverse.evaluation.study import read_study
from workshop.recorded import find_recorded

SCORES = {
    "entropy": "variety",
    "retention": "identity",
    "prompt_accuracy": "prompt",
    "contradict_accuracy": "contradicting",
    "copy_rate": "copies",
    "invalid_rate": "invalid",
}


def runs_of(name: str, folder: Path, pairs: list[Pair], seeds: int) -> list[dict[str, PairSums]]:
    """The scores of each training seed of an arm, at most `seeds` of them.

    Raises:
        DataError: Nothing of the arm was read.
    """
    read = [find_recorded(folder, name, number) for number in range(seeds)]
    found = [one for one in read if one is not None]
    if not found:
        raise DataError("has no readings", where=name, expected=f"a file in {folder}")
    return [pair_sums(critters_sets(one.seen, pairs)) for one in found]


def as_text(found: Difference, holds: bool) -> str:
    """A difference with its interval, marked if it holds together with the others of its column."""
    mark = " *" if holds else ""
    return f"{found.estimate:+.3f}{mark} ({found.low:+.3f} to {found.high:+.3f})"


def main() -> None:
    """Print a Markdown table: estimate and 95 % interval of every difference.

    A * marks those that hold together over all arms of a column (Holm, 5 %).
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("others", nargs="+")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--config", type=Path, default=Path("studies/variety.toml"))
    parser.add_argument("--readings", type=Path, default=Path("docs/study/readings"))
    chosen = parser.parse_args()
    study = read_study(chosen.config)
    pairs = study_pairs(study.pairs, study.seed, study.split, study.edits)
    base = runs_of(chosen.base, chosen.readings, pairs, chosen.seeds)
    print(f"| less `{chosen.base}` | {' | '.join(SCORES.values())} |")
    print("|---" * (len(SCORES) + 1) + "|")
    columns = list[list[str]]()
    others = [runs_of(name, chosen.readings, pairs, chosen.seeds) for name in chosen.others]
    for score in SCORES:
        less = [difference([r[score] for r in runs], [r[score] for r in base]) for runs in others]
        held = holm([found.p for found in less])
        columns.append([as_text(*each) for each in zip(less, held, strict=True)])
    for name, *cells in zip(chosen.others, *columns, strict=True):
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
