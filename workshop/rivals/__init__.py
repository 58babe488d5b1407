"""Training-free rivals of the product's levers. Importing this package registers them.

They were measured against the levers that ship and are kept so that studies can draw them again.
"""

from workshop.rivals import drop, late_layout, remove_stated

__all__ = ["drop", "late_layout", "remove_stated"]
