"""What each level of fast mode saves: operations on SD 1.5's architecture, time on critters.

    python benchmarks/fast.py [--rounds 15] [--sizes 256 512] [--parts losses]
        [--out FILE.json]

Operations are counted without computing (device "meta"): all steps of a call, with a plus adapter
of 16 tokens, against stock diffusers' own processors. Times are those of the embedded base with the
plain plus adapter, against stock with the same file, alternating in one process. Steps of SD 1.5's
architecture are timed one by one, at half its width. `--parts losses` draws and scores held-out
pairs at every level, which takes a quarter of an hour.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from dial import IMAGES, PROMPT, STEPS, call
from diffusers import UNet2DConditionModel
from PIL import Image
from timing import alternating, flops, machine, ratio_of

from ipdiverse import attach, load_adapter, load_base
from ipdiverse.adapter.attach.attach import _processors
from ipdiverse.adapter.attention import BOTH, NOTHING, Slot, TokenGroup
from ipdiverse.adapter.model import ImagePromptAdapter, layer_widths
from ipdiverse.adapter.projection import ResamplerProjection
from ipdiverse.base.adapters import adapter_file
from ipdiverse.base.bases import CRITTERS
from ipdiverse.dial import Levers
from ipdiverse.sampling.denoiser import release, steer
from ipdiverse.sampling.fast import LEVELS, Fast

if TYPE_CHECKING:
    from collections.abc import Callable

COUNTED_STEPS, GUIDANCE = 50, 7.5
_SCORES = ("prompt_accuracy", "retention", "entropy", "invalid_rate")


def sd15_unet(narrow: int = 1) -> Any:
    """Stable Diffusion 1.5's, with random weights, and so many times narrower."""
    return UNet2DConditionModel(
        sample_size=64,
        cross_attention_dim=768,
        attention_head_dim=8,
        block_out_channels=tuple(width // narrow for width in (320, 640, 1280, 1280)),
    )


def stock_step(size: int, narrow: int = 1) -> Callable[[], Any]:
    """One of stock's, which projects the image and every text again."""
    unet = sd15_unet(narrow)
    adapter = ImagePromptAdapter(ResamplerProjection(1280, 768, 16, 768, 4), layer_widths(unet))
    parts: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, value in adapter.state_dict().items():
        part, _, rest = name.partition(".")
        parts[part][rest] = value
    unet._load_ip_adapter_weights([parts], low_cpu_mem_usage=False)
    unet.requires_grad_(False)
    image = {"image_embeds": [torch.empty(2, 1, 257, 1280)]}
    sample, text = torch.empty(2, 4, size // 8, size // 8), torch.empty(2, 77, 768)
    return lambda: unet(sample, 1, text, added_cond_kwargs=image)


Steps = dict[str, tuple[int, "Callable[[], Any]"]]
"""Kinds of steps of a call: how many of each, and what runs one."""


@torch.no_grad()
def our_steps(size: int, level: int, narrow: int = 1) -> Steps:
    """The steps of a call by their kind, as a level plans them."""
    unet = sd15_unet(narrow)
    adapter = ImagePromptAdapter(ResamplerProjection(1280, 768, 16, 768, 4), layer_widths(unet))
    unet.requires_grad_(False)
    adapter.requires_grad_(False)
    slot = Slot(adapter.layers())
    processors = _processors(unet, [slot], joint=False)
    unet.set_attn_processor({**unet.attn_processors, **processors})
    chosen = LEVELS[level]
    fast = None if chosen is None else Fast(unet, chosen, [*processors.values()])
    sample = torch.empty(1, 4, size // 8, size // 8)
    wanted: tuple[str, ...] = (NOTHING, BOTH)
    given = {n: (torch.empty(n, 77, 768), torch.empty(n, 16, 768)) for n in (1, 2)}
    found: Steps = {}
    for step in range(COUNTED_STEPS):
        weights = {NOTHING: 1 - GUIDANCE, BOTH: GUIDANCE}
        if fast is not None:
            wanted = fast.plan(step / COUNTED_STEPS, weights, sample.shape)
        text, tokens = given[len(wanted)]
        rows = torch.cat([sample] * len(wanted))
        deep = fast is None or fast.deep
        name = f"{'deep' if deep else 'shallow'}, {len(wanted)} branches"

        def run(
            wanted: tuple[str, ...] = wanted,
            group: TokenGroup = TokenGroup(tokens),  # noqa: B008
            rows: torch.Tensor = rows,
            text: torch.Tensor = text,
            deep: bool = deep,
        ) -> None:
            slot.groups = [group]
            if fast is not None:
                # cross-attention counts as computed: what level 3 keeps of it late is on top
                fast.deep, fast._features.branches, fast._progress = deep, wanted, 0.0
            with nullcontext() if fast is None else fast.acting():
                unet(rows, 1, text)

        if name not in found:  # a step of one kind has as many operations as another
            run()  # keys and values are projected once a call, not at each step
        found[name] = (found.get(name, (0, run))[0] + 1, found.get(name, (0, run))[1])
        if fast is not None:
            fast.completed(weights, dict(zip(wanted, rows.chunk(len(wanted)), strict=True)))
    return found


def counted(sizes: list[int]) -> list[dict[str, Any]]:
    """Stock's operations over ours, for each size and level."""
    cells: list[dict[str, Any]] = []
    with torch.device("meta"), torch.no_grad():
        for size in sizes:
            stock = flops(stock_step(size)) * COUNTED_STEPS
            projection = ResamplerProjection(1280, 768, 16, 768, 4).requires_grad_(False)
            once = flops(lambda: projection(torch.empty(2, 257, 1280)))  # noqa: B023
            for level in range(len(LEVELS)):
                kinds = {
                    name: {"steps": count, "gflop": flops(run) / 1e9}
                    for name, (count, run) in our_steps(size, level).items()
                }
                total = once + 1e9 * sum(one["steps"] * one["gflop"] for one in kinds.values())
                cells.append({"size": size, "level": level, "operations_ratio": stock / total})
                cells[-1] |= {"stock_gflop": stock / 1e9, "gflop": total / 1e9, "kinds": kinds}
    return cells


def composed(size: int, rounds: int, narrow: int) -> list[dict[str, Any]]:
    """Stock's time over ours for a call, from the times of single steps of each kind.

    A whole call of 50 steps takes minutes on a CPU. Steps of one kind cost the same, so that a call
    costs the sum of its steps; the resampler, which ours runs once a call, is left out of ours.
    """
    torch.manual_seed(0)
    ours = {level: our_steps(size, level, narrow) for level in (0, *range(2, len(LEVELS)))}
    runs = {"stock": stock_step(size, narrow)}
    runs |= {f"{n}: {kind}": run for n, kinds in ours.items() for kind, (_, run) in kinds.items()}
    with torch.no_grad():
        times = alternating(runs, rounds)
    cells = []
    for level, kinds in ours.items():
        total = sum(count * times[f"{level}: {kind}"] for kind, (count, _) in kinds.items())
        cells.append({"size": size, "level": level})
        cells[-1] |= ratio_of(COUNTED_STEPS * times["stock"], np.asarray(total))
    return cells


def timed(rounds: int) -> list[dict[str, Any]]:
    """Stock's time over ours on critters, decoding included, and the same of operations."""
    from ipdiverse.critters.render import render
    from ipdiverse.critters.scene import sample_scene
    from ipdiverse.sampling.sample import space_of

    file = Path(adapter_file(CRITTERS, "plus"))
    image = Image.fromarray(render(sample_scene(np.random.default_rng(0)), 0))
    stock, ours = load_base().pipe, load_base().pipe
    for pipe in (stock, ours):
        pipe.set_progress_bar_config(disable=True)
    stock.load_ip_adapter(str(file.parent), subfolder="", weight_name=file.name)
    attachment = attach(ours, load_adapter(file))
    attachment.set_reference(image)
    attachment.set_space(space_of("", attachment.adapters[0]))

    def at(level: int) -> None:
        release(attachment)
        steer(attachment, Levers(recombine=1.0), range(IMAGES), [PROMPT], level)
        call(ours)

    runs: dict[str, Any] = {"stock": lambda: call(stock, ip_adapter_image=image)}
    runs |= {str(level): lambda level=level: at(level) for level in range(len(LEVELS))}
    operations = {name: flops(run) for name, run in runs.items()}
    times = alternating(runs, rounds)
    return [
        {
            "level": level,
            **ratio_of(times["stock"], times[str(level)]),
            "of_level_0": ratio_of(times["0"], times[str(level)]),
            "operations_ratio": operations["stock"] / operations[str(level)],
        }
        for level in range(len(LEVELS))
    ]


def losses(pairs: int, images: int, folder: Path) -> dict[str, Any]:
    """Scores at level 0, and how far each level is from them, pair by pair.

    Args:
        pairs: Held-out (prompt, reference) pairs of critters.
        images: Of each.
        folder: Where drawn images are kept; the same call goes on there.
    """
    from ipdiverse.evaluation.bootstrap import difference
    from ipdiverse.evaluation.running import Runner
    from ipdiverse.evaluation.study import Arm, Study

    settings: dict[str, Any] = {"adapter": "plus", "diversity": 1.0}
    arms = tuple(Arm(f"fast {n}", "fast", settings | {"fast": n}) for n in range(len(LEVELS)))
    runner = Runner(Study(arms, pairs=pairs, images=images, steps=STEPS), folder, progress=False)
    with runner:
        exact, *fast = [runner.measure(arm) for arm in arms]
    names = [name for name in exact.runs[0] if name.startswith(_SCORES)]
    found: dict[str, Any] = {"what": f"{pairs} pairs x {images} images, plus, dial at 1"}
    found["level 0"] = {name: exact.row()["scores"][name][0] for name in names}
    found["changes"] = [
        {
            "level": level,
            "scores": {
                name: list(difference(one.sums(name), exact.sums(name))[:3]) for name in names
            },
        }
        for level, one in enumerate(fast, 1)
    ]
    return found


def main() -> None:
    """Measure and print a table; write JSON where asked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--losses", type=Path, default=Path("out/fast"), help="keeps what is drawn")
    parser.add_argument("--parts", nargs="+", default=["sd15", "sd15 steps", "critters"])
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--steps-rounds", type=int, default=15)
    parser.add_argument("--steps-size", type=int, default=256)
    parser.add_argument("--narrow", type=int, default=2)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    before = chosen.out.read_text() if chosen.out and chosen.out.is_file() else "{}"
    report: dict[str, Any] = json.loads(before)
    report |= {
        "peer": "stock diffusers' IP-Adapter, the same weights",
        "levels": [None if one is None else vars(one) for one in LEVELS],
    }
    measured: dict[str, Callable[[], dict[str, Any]]] = {
        "sd15": lambda: {
            "steps": COUNTED_STEPS,
            "guidance": GUIDANCE,
            "counted": counted(chosen.sizes),
        },
        "sd15 steps": lambda: {
            "what": "SD 1.5's architecture, random weights, "
            f"{chosen.narrow} times narrower; composed of single steps",
            "rounds": chosen.steps_rounds,
            **machine(),
            "cells": composed(chosen.steps_size, chosen.steps_rounds, chosen.narrow),
        },
        "critters": lambda: {
            "what": f"critters, {STEPS} steps, {IMAGES} images, recombine at 1",
            "rounds": chosen.rounds,
            **machine(),
            "cells": timed(chosen.rounds),
        },
        "losses": lambda: losses(chosen.pairs, 8, chosen.losses),
    }
    for part in chosen.parts:
        report[part] = measured[part]()
        if chosen.out:  # part by part, as all of them take long
            chosen.out.write_text(json.dumps(report, indent=1) + "\n")
    print("| level | stock / ours | 95 % | operations, stock / ours |\n|---|---|---|---|")
    for cell in report.get("critters", {}).get("cells", []):
        print(
            f"| {cell['level']} | {cell['ratio']:.2f} | {cell['low']:.2f} to {cell['high']:.2f} "
            f"| {cell['operations_ratio']:.2f} |"
        )


if __name__ == "__main__":
    main()
