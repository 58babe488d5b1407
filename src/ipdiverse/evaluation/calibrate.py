"""Calibration of the dial: the levers' best path for one adapter on one base.

From stock IP-Adapter (of an adapter that holds the weights it went on from: from these), the lever
whose next rung gains most variety for what it costs is moved, again and again, as long as what was
asked for is kept; where none is left, one that copies less at the same variety. Isotonic regression
then places each point so that the dial is linear in the variety that was achieved.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ipdiverse.dial import OFF, Achieved, Dial, Levers, current_names
from ipdiverse.errors import ArgumentError
from ipdiverse.evaluation.bootstrap import estimate
from ipdiverse.evaluation.running import Runner
from ipdiverse.evaluation.study import Arm, Study
from ipdiverse.levers import LEVERS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from ipdiverse.evaluation.metrics import Floats
    from ipdiverse.evaluation.options import CalibrateOptions

KEPT = 0.95
"""Share of the retention at 0 that every setting must keep."""
_LEAST_GAIN = 0.01
"""Variety below which a rung is not worth a point of the path."""
_REACH = 2
"""Rungs of a lever that are tried before it counts as gaining nothing."""
_LEAST_COST = 0.005
"""Fidelity that cannot be told from nothing, on as few pairs."""


def calibrate(
    options: CalibrateOptions, out: Path, say: Callable[[str], None] = lambda _: None
) -> tuple[Dial, list[dict[str, Any]]]:
    """Find the path of an adapter.

    Args:
        options: Which, and on what it is measured.
        out: Folder for images; an interrupted calibration in it goes on.
        say: Told of every point that the path gains.

    Returns:
        The dial, and every point with what it achieved.

    Raises:
        IpdiverseError: Something is unusable, or no lever gains anything.
    """
    named = dict.fromkeys(options.levers)  # by their names of today
    options = replace(options, levers=tuple(current_names(named, "--levers", typed=True)))
    movable = [name for name, lever in LEVERS.items() if lever.ladder]
    if unknown := sorted(set(options.levers) - set(movable)):
        raise ArgumentError(
            "are none that a dial may move",
            where="levers",
            expected=", ".join(movable),
            found=", ".join(unknown),
        )
    study = study_of(options)
    start, ladders = _ladders(options.adapter, options.base)
    _check_there(options.levers, ladders, f"adapter {options.adapter}")
    runner = Runner(study, out, progress=False)
    if options.levers:
        ladders = {name: rungs for name, rungs in ladders.items() if name in options.levers}
    path = climb(start, ladders, partial(_measured, runner, options), say)
    if len(path) < 2:
        raise ArgumentError(
            "gains variety from no lever at what must be kept",
            where=options.adapter,
            found=f"variety {path[0][1].variety:.3f}",
        )
    on = f"{runner.study.pairs} pairs of {options.images} images, {study.steps} steps"
    dial = placed(path, f"calibrated on {on}")
    return dial, [{**levers, **asdict(scores)} for levers, scores in path]


def study_of(options: CalibrateOptions) -> Study:
    """Pairs that neither training nor the published study saw.

    Raises:
        ArgumentError: A number is out of range, or prompts stand without references.
    """
    return Study(
        arms=(Arm("stock", "path", {"adapter": options.adapter}),),
        base=options.base,
        pairs=options.pairs,
        images=options.images,
        steps=options.steps,
        seed=11,
        split="validation",
        references=options.references,
        prompts=options.prompts,
        features=options.features,
        image_encoder=options.image_encoder,
    )


def _measured(runner: Runner, options: CalibrateOptions, levers: Levers) -> Achieved:
    """What levers achieve."""
    on = dict(levers)
    name = ", ".join(f"{key} {value}" for key, value in on.items()) or "stock"
    measured = runner.measure(Arm(name, "path", {"adapter": options.adapter, **on}))
    found = {n: estimate(measured.parts(n)) for n in measured.runs[0]}
    return _scores(found, options.images)


def climb(
    start: Levers,
    ladders: dict[str, tuple[Any, ...]],
    measure: Callable[[Levers], Achieved],
    say: Callable[[str], None] = lambda _: None,
) -> list[tuple[Levers, Achieved]]:
    """The greedy path: each point is one rung of one lever above the one before.

    Rungs that gain variety come first; once none does any more, those that copy less at the same.

    Args:
        start: Where the dial is at 0.
        ladders: Rungs of each lever, the first as in `start`.
        measure: What levers achieve.
        say: Told of every point.
    """
    measure = cache(measure)
    path, heights = [(start, measure(start))], dict.fromkeys(ladders, 0)
    while True:
        above = partial(_best_rung, path, heights, ladders, measure)
        found = above(_gain) or (above(_copies_lost) if len(path) > 1 else None)
        if found is None:
            return path
        name, heights[name], levers, scores = found
        path.append((levers, scores))
        say(
            f"{name} {getattr(levers, name)}: variety {scores.variety:.3f}, "
            f"retention {scores.retention:.3f}"
            + ("" if scores.accuracy is None else f", prompt {scores.accuracy:.3f}")
            + ("" if scores.copies is None else f", copies {scores.copies:.3f}")
        )


def _best_rung(
    path: list[tuple[Levers, Achieved]],
    heights: dict[str, int],
    ladders: dict[str, tuple[Any, ...]],
    measure: Callable[[Levers], Achieved],
    gained: Callable[[Achieved, Achieved], float],
) -> tuple[str, int, Levers, Achieved] | None:
    """The lever, its rung, and what that achieves, whose gain is the largest for what it costs."""
    (_, first), (levers, now) = path[0], path[-1]
    best, most = None, 0.0
    for name, rungs in ladders.items():
        for height in range(heights[name] + 1, min(heights[name] + 1 + _REACH, len(rungs))):
            candidate = levers | {name: rungs[height]}
            found = measure(candidate)
            if not _keeps(found, first):
                break
            gain = gained(found, now)
            if not gain:
                continue  # a rung may be too near the one before
            worth = gain / (max(0.0, now.retention - found.retention) + _LEAST_COST)
            if worth > most:
                best, most = (name, height, candidate, found), worth
            break
    return best


def _gain(found: Achieved, now: Achieved) -> float:
    """Variety gained; 0 where it is not worth a point of the path."""
    gain = found.variety - now.variety
    return gain if gain >= _LEAST_GAIN else 0.0


def _copies_lost(found: Achieved, now: Achieved) -> float:
    """By how much less is copied at the same variety; 0 where that cannot be told from nothing."""
    if found.copies is None or now.copies is None or found.variety < now.variety - _LEAST_COST:
        return 0.0
    lost = now.copies - found.copies
    return lost if lost >= _LEAST_COST else 0.0


def placed(path: Sequence[tuple[Levers, Achieved]], source: str) -> Dial:
    """A path as a dial that is linear in variety; what gains nothing more is left out."""
    variety = isotonic(np.array([scores.variety for _, scores in path]))
    settings = (variety - variety[0]) / max(1e-9, variety[-1] - variety[0])
    kept = [(0.0, *path[0])]
    for setting, (levers, scores) in zip(settings[1:].tolist(), path[1:], strict=True):
        if setting > kept[-1][0] + 1e-6:
            kept.append((setting, levers, scores))
        elif len(kept) > 1:
            kept[-1] = (kept[-1][0], levers, scores)
    kept[-1] = (1.0, *kept[-1][1:])
    points = tuple((setting, levers) for setting, levers, _ in kept)
    return Dial(points, source, tuple(scores for _, _, scores in kept))


def isotonic(values: Floats) -> Floats:
    """The nearest sequence that never falls (pool adjacent violators)."""
    blocks: list[list[float]] = []
    for value in values.tolist():
        blocks.append([value, 1.0])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            fallen, size = blocks.pop()
            mean, count = blocks[-1]
            blocks[-1] = [(mean * count + fallen * size) / (count + size), count + size]
    return np.concatenate([[mean] * int(size) for mean, size in blocks])


def _keeps(found: Achieved, first: Achieved) -> bool:
    """Whether a setting keeps what was asked for."""
    obeys = first.accuracy is None or (found.accuracy or 0) >= first.accuracy - _LEAST_COST
    whole = found.invalid <= first.invalid + 0.01
    return obeys and whole and found.retention >= KEPT * first.retention


def _scores(found: dict[str, float], images: int) -> Achieved:
    if "entropy" in found:
        return Achieved(
            found["entropy"],
            found["retention"],
            found["prompt_accuracy"],
            found["invalid_rate"],
            found["copy_rate"],
        )
    vendi = next(value for name, value in found.items() if name.startswith("vendi"))
    close = next(value for name, value in found.items() if name.startswith("image"))
    said = next((value for name, value in found.items() if name.startswith("text")), None)
    copies = next(value for name, value in found.items() if name.startswith("copies"))
    return Achieved(vendi / images, close, said, copies=copies)


def _check_there(wanted: Sequence[str], there: Iterable[str], where: str) -> None:
    """Refuse levers that would move nothing, or stop the climb."""
    if lacking := sorted(set(wanted) - set(there)):
        raise ArgumentError(
            "has no such lever", where=where, expected=", ".join(there), found=", ".join(lacking)
        )


def _ladders(adapter: str, base: str) -> tuple[Levers, dict[str, tuple[Any, ...]]]:
    """Where an adapter's dial starts, and the ladders that it can climb."""
    from ipdiverse.adapter.files.checkpoint import load_adapter
    from ipdiverse.adapter.files.sources import local_file
    from ipdiverse.base.bases import adapter_source

    opened = load_adapter(local_file(adapter_source(base, adapter)))
    ladders = {
        n: lever.ladder for n, lever in LEVERS.items() if lever.ladder and lever.fits(opened)
    }
    if opened.plain:  # at an interpolation of 0 there is no fusion
        if "fusion_strength" in ladders:
            ladders["fusion_strength"] = (1.0, 1.5)
        return Levers(interpolation=0.0), ladders
    return OFF if opened.fusion is None else Levers(fusion_strength=0.0), ladders
