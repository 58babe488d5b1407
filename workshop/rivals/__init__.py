"""Training-free rivals of the product's levers. Importing this package registers them.

They were measured against the levers that ship and are kept so that studies can draw them again.
"""

from ipdiverse.levers import register_lever
from workshop.rivals.drop import DROP
from workshop.rivals.late_layout import LATE_LAYOUT
from workshop.rivals.remove_stated import REMOVE_STATED

RIVALS = (DROP, LATE_LAYOUT, REMOVE_STATED)

for _rival in RIVALS:
    register_lever(_rival)
