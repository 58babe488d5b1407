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

from ipdiverse.dial import OFF, Achieved, Dial, Levers, changed
from ipdiverse.errors import ArgumentError
from ipdiverse.evaluation.bootstrap import estimate
from ipdiverse.evaluation.running import Runner
from ipdiverse.evaluation.study import Arm, Study
from ipdiverse.sampling.removal import joint_text

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

LADDERS: dict[str, tuple[Any, ...]] = {
    "training": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0),
    "fusion_strength": (0.0, 0.5, 1.0, 1.5),
    "noise_level": (0, 150, 300, 450, 600, 750),
    "interval": (None, (0.0, 8.0), (0.0, 4.0), (0.0, 3.0)),
    "cads": (0.0, 0.1, 0.2, 0.35, 0.6, 1.0),
    "drop": (0.0, 0.1, 0.25, 0.5),
    "late_layout": (0.0, 0.1, 0.2, 0.4),
    "remove_stated": (0.0, 0.5, 1.0),
    "shield": (0.0, 0.2, 0.4, 0.6),
}
"""Rungs of each lever, from off upwards. Left out are levers on a set, with which an image depends
on the others, and factorised guidance, as its third pass costs more than stock."""


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
    if unknown := sorted(set(options.levers) - LADDERS.keys()):
        raise ArgumentError(
            "are none that a dial may move",
            where="levers",
            expected=", ".join(LADDERS),
            found=", ".join(unknown),
        )
    study = study_of(options)
    start, ladders = _ladders(options.adapter, options.base)
    _check_there(options.levers, ladders, f"adapter {options.adapter}")
    runner = Runner(study, out, progress=False)
    ladders = {name: rungs for name, rungs in ladders.items() if _works(name, runner)}
    _check_there(options.levers, ladders, f"base {options.base}")
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
    return dial, [{**asdict(levers), **asdict(scores)} for levers, scores in path]


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
    on = changed(levers)
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
            candidate = replace(levers, **{name: rungs[height]})
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


def _works(lever: str, runner: Runner) -> bool:
    """Whether a lever finds what it needs in the base, as it was placed."""
    base = runner.base
    if lever == "shield":  # needs the VAE while the UNet runs
        return base.plan is None or base.plan.offload != "model"
    if lever != "remove_stated":
        return True
    encoder = base.pipe.image_encoder if runner.reader is None else runner.reader[0]
    width = None if encoder is None else encoder.config.projection_dim
    return width is not None and joint_text(base.pipe, [""], width) is not None


def _ladders(adapter: str, base: str) -> tuple[Levers, dict[str, tuple[Any, ...]]]:
    """Where an adapter's dial starts, and the ladders that it can climb."""
    from ipdiverse.adapter.files.checkpoint import load_adapter
    from ipdiverse.base.adapters import adapter_file

    opened = load_adapter(adapter_file(base, adapter))
    lacks = {
        "training": not opened.base_weights,
        "fusion_strength": opened.fusion is None,
        "noise_level": True,
    }
    ladders = {name: rungs for name, rungs in LADDERS.items() if not lacks.get(name)}
    if opened.base_weights:  # at a training of 0 there is no fusion
        if "fusion_strength" in ladders:
            ladders["fusion_strength"] = (1.0, 1.5)
        return replace(OFF, training=0.0), ladders
    return OFF if opened.fusion is None else replace(OFF, fusion_strength=0.0), ladders
