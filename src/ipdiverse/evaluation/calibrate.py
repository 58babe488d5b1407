"""Calibration of the dial: the levers' best path for one adapter on one base.

The path starts at stock IP-Adapter, or at the base weights of a fine-tuned adapter that holds them.
Each step moves the lever whose next rung gains most variety for what it costs, as long as what was
asked for is kept; once none does, a lever that copies less at the same variety. Isotonic regression
then places each point so that the dial is linear in the variety that was achieved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from scipy.optimize import isotonic_regression

from ipdiverse.adapter.files.checkpoint import load_adapter
from ipdiverse.adapter.files.conversion import copy_with_spec, store_base_weights
from ipdiverse.base.adapters import adapter_file
from ipdiverse.config import renamed
from ipdiverse.dial import OFF, RENAMED_LEVERS, Achieved, Dial, Levers, current_names
from ipdiverse.errors import ArgumentError
from ipdiverse.evaluation.bootstrap import estimate
from ipdiverse.evaluation.running import Runner
from ipdiverse.evaluation.study import Arm, Study
from ipdiverse.levers import LEVERS
from ipdiverse.writing import only_one

KEPT = 0.95
"""Share of the retention at 0 that every setting must keep."""
_LEAST_GAIN = 0.01
"""Variety below which a rung is not worth a point of the path."""
_REACH = 2
"""Rungs of a lever that are tried before it counts as gaining nothing."""
_LEAST_COST = 0.005
"""Fidelity that cannot be told from nothing on so few pairs."""
_SEED = 11
"""Of the pairs; the published study has another."""


def calibration_study(adapter: str, **numbers: Any) -> Study:
    """Pairs to calibrate on, which neither training nor the published study saw.

    `numbers` are other fields of `Study`, which checks them.
    """
    arm = Arm("stock", "path", {"adapter": adapter})
    return Study(arms=(arm,), seed=_SEED, split="validation", **numbers)


def calibrate(
    study: Study,
    out: Path,
    levers: Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
    target: Path | None = None,
    base_weights: str | None = None,
) -> tuple[Dial, list[dict[str, Any]]]:
    """Find the path of an adapter: its dial, and every point with what it achieved.

    Args:
        out: Folder for images; a calibration that was interrupted there resumes, and a second one
            at the same time is refused.
        levers: Those that the dial may move; empty is all that the adapter has.
        target: A copy of the adapter that gets the dial, or its own file; None writes none.
        base_weights: The adapter that this one was fine-tuned from, to be stored in the target.
    """
    [adapter] = study.sources
    # before a folder is made; levers may need the base weights
    found = None if base_weights else _movable(study, adapter, levers)
    with only_one(out, *([] if target is None else [target])):
        if base_weights is not None and target is not None:
            own, before = (adapter_file(study.base, one) for one in (adapter, base_weights))
            store_base_weights(own, before, target)
            adapter = str(target)
            study = replace(study, arms=calibration_study(adapter).arms)
        start, ladders = found or _movable(study, adapter, levers)
        runner = Runner(study, out, progress=False)
        path = climb(start, ladders, partial(_measured, runner, adapter), say)
        if len(path) < 2:
            raise ArgumentError(
                "no lever gains variety while it keeps what was asked for",
                where=adapter,
                found=f"variety {path[0][1].variety:.3f}",
            )
        on = f"{runner.study.pairs} pairs of {study.images} images, {study.steps} steps"
        dial = placed(path, f"calibrated on {on}")
        if target is not None:
            copy_with_spec(adapter_file(study.base, adapter), target, {"dial": dial.as_spec()})
    return dial, [{**levers, **asdict(scores)} for levers, scores in path]


def _movable(
    study: Study, adapter: str, levers: Sequence[str]
) -> tuple[Levers, dict[str, tuple[Any, ...]]]:
    """Where the dial starts, and the ladders of the levers that it may move."""
    # by their names of today
    asked = levers
    levers = tuple(current_names(renamed(dict.fromkeys(levers), RENAMED_LEVERS, "--levers")))
    movable = [name for name, lever in LEVERS.items() if lever.ladder]
    # nothing left of those that were asked for is not the same as all
    if unknown := sorted(set(levers) - set(movable)) or ([] if levers else asked):
        raise ArgumentError(
            "cannot be moved by a dial",
            where="levers",
            expected=", ".join(movable),
            found=", ".join(unknown),
        )
    start, ladders = _ladders(adapter, study.base)
    if lacking := sorted(set(levers) - ladders.keys()):
        raise ArgumentError(
            "does not have this lever",
            where=f"adapter {adapter}",
            expected=", ".join(ladders),
            found=", ".join(lacking),
        )
    return start, {name: r for name, r in ladders.items() if not levers or name in levers}


def climb(
    start: Levers,
    ladders: dict[str, tuple[Any, ...]],
    measure: Callable[[Levers], Achieved],
    say: Callable[[str], None] = lambda _: None,
) -> list[tuple[Levers, Achieved]]:
    """The greedy path: each point is one rung of one lever above the one before.

    Rungs that gain variety come first; once none does, those that copy less at the same variety.
    `start` is the dial at 0, the first rung of every ladder; `measure` tells what levers achieve.
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


def placed(path: Sequence[tuple[Levers, Achieved]], source: str) -> Dial:
    """A path as a dial that is linear in variety, without points that gain nothing more."""
    # greedy points can lose a little variety again, and settings must rise
    variety = isotonic_regression([scores.variety for _, scores in path]).x
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


def _ladders(adapter: str, base: str) -> tuple[Levers, dict[str, tuple[Any, ...]]]:
    """Where an adapter's dial starts, and the ladders that it can climb."""
    opened = load_adapter(adapter_file(base, adapter))
    ladders = {
        name: lever.ladder for name, lever in LEVERS.items() if lever.ladder and lever.fits(opened)
    }
    if opened.base_weights:
        if "fusion_strength" in ladders:
            # an interpolation of 0 leaves the fusion out already, so that it need not start at 0
            ladders["fusion_strength"] = (1.0, 1.5)
        return Levers(interpolation=0.0), ladders
    return OFF if opened.fusion is None else Levers(fusion_strength=0.0), ladders


def _measured(runner: Runner, adapter: str, levers: Levers) -> Achieved:
    """What levers achieve on the pairs of a calibration: on critters, or as encoders see it."""
    on = dict(levers)
    name = ", ".join(f"{key} {value}" for key, value in on.items()) or "stock"
    measured = runner.measure(Arm(name, "path", {"adapter": adapter, **on}))
    found = {n: estimate(measured.sums(n)) for n in measured.runs[0]}
    if "entropy" in found:
        names = ("entropy", "retention", "prompt_accuracy", "invalid_rate", "copy_rate")
        return Achieved(*(found[name] for name in names))

    def first(kind: str) -> Any:
        return next((value for name, value in found.items() if name.startswith(kind)), None)

    # the first encoder that compares images, and the first that reads text: not every one does
    variety = first("vendi") / runner.study.images
    return Achieved(variety, first("image"), first("text"), copies=first("copies"))


def _best_rung(
    path: list[tuple[Levers, Achieved]],
    heights: dict[str, int],
    ladders: dict[str, tuple[Any, ...]],
    measure: Callable[[Levers], Achieved],
    gained: Callable[[Achieved, Achieved], float],
) -> tuple[str, int, Levers, Achieved] | None:
    """The lever and rung that gain most for what they cost, and what they achieve."""
    (_, first), (levers, now) = path[0], path[-1]
    best, most = None, 0.0
    for name, rungs in ladders.items():
        for height in range(heights[name] + 1, min(heights[name] + 1 + _REACH, len(rungs))):
            candidate = levers | {name: rungs[height]}
            found = measure(candidate)
            if not _keeps(found, first):
                break  # a higher rung keeps less still
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


def _keeps(found: Achieved, first: Achieved) -> bool:
    """Whether a setting keeps what was asked for."""
    obeys = first.accuracy is None or (found.accuracy or 0) >= first.accuracy - _LEAST_COST
    whole = found.invalid <= first.invalid + 0.01
    return obeys and whole and found.retention >= KEPT * first.retention
