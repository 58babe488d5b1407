"""Why images are alike: what in the settings that were used narrows a set, most likely first."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ipdiverse.sampling.request import Request

HIGH_SCALE = 0.8
HIGH_GUIDANCE = 1.5
"""Times the base's own default."""
LOW_DIAL = 0.2
WIDE_DIAL = 0.9
DETAILED = 12
"""Words from which a prompt states much."""


def why_alike(request: Request, calibrated: bool, usual_guidance: float) -> list[str]:
    """What narrowed a set, and what to do about it; a sentence each.

    Args:
        request: What was drawn, defaults filled in.
        calibrated: The adapter carries a dial of its own.
        usual_guidance: The base's default.
    """
    dial, scale = request.diversity or 0.0, request.scale or 0.0
    guidance = request.guidance_scale or 0.0
    several = len(request.image) > 1 and request.combine == "concat"
    words = len(" ".join(request.prompt).split())
    causes = [
        (
            dial <= LOW_DIAL,
            f"Diversity is {dial:g}: a plain image prompt, which copies. Move it up.",
        ),
        (
            calibrated and LOW_DIAL < dial < WIDE_DIAL,
            f"Diversity is {dial:g}: this adapter's dial goes further. Move it up.",
        ),
        (
            scale >= HIGH_SCALE and not calibrated,
            f"The adapter scale is {scale:g}: the reference decides nearly everything. "
            "Try 0.5 to 0.7.",
        ),
        (
            guidance >= HIGH_GUIDANCE * usual_guidance,
            f"Guidance is {guidance:g}, and this base's default is {usual_guidance:g}: high "
            "guidance narrows. Lower it.",
        ),
        (
            several,
            "Several references are used together, so less is left open. Use one, or average them.",
        ),
        (
            words >= DETAILED,
            f"The prompt states much ({words} words): what it states does not vary. Say less.",
        ),
        (
            not words,
            "There is no prompt: the reference alone decides. Say what should be different.",
        ),
        (
            not calibrated,
            "This adapter was not calibrated, so the dial takes a cautious default path. "
            "`ipdiverse calibrate` finds its own.",
        ),
    ]
    return [text for holds, text in causes if holds] or [
        "Nothing in the settings narrows it: the model knows little else for this prompt and "
        "reference. Try another prompt or seed."
    ]
