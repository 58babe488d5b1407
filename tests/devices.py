"""What stands for hardware that is not here."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class WithoutFloat64(Tensor):
    """As a tensor on a device that has no float64, such as MPS; it lies on the CPU all the same."""

    def double(self, *_: Any, **__: Any) -> Tensor:
        """Refuse, as the device does."""
        raise TypeError("Cannot convert a MPS Tensor to float64")

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        """The same numbers where float64 exists."""
        return self.as_subclass(Tensor)


class Elsewhere(Tensor):
    """As a tensor on an accelerator: NumPy cannot read it there."""

    def numpy(self, *_: Any, **__: Any) -> Any:
        """Refuse, as the device does."""
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        """The same numbers where NumPy can."""
        return self.as_subclass(Tensor)
