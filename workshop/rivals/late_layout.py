"""The layout first: layers that carry it see the image only after some of the steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ipdiverse.adapter.scale import Layer, Scale, resolve_scale
from ipdiverse.levers import Lever, StepContext

if TYPE_CHECKING:
    from torch import Tensor


def without_layout_until(scale: Scale, strength: float, context: StepContext) -> Scale:
    """The same scale, but 0 in the layers that carry the layout until a share of the steps is done.

    Layout is decided in the first steps, by those layers (InstantStyle, arXiv:2404.02733).

    Args:
        scale: Of all layers.
        strength: The share, 0..1.
        context: Its layers are the UNet's.
    """
    if strength == 0:
        return scale
    carries = resolve_scale("layout", context.layers)

    def of(layer: Layer, progress: float) -> float | Tensor:
        waits = progress < strength and carries.at(layer, 0.0) != 0
        return 0.0 if waits else scale.of(layer, progress)

    return Scale(of, True, scale.start_at, scale.end_at, scale.opposed)


LATE_LAYOUT = Lever(
    "late_layout",
    "Fraction of the steps before layout layers see the image.",
    "scale",
    without_layout_until,
)
