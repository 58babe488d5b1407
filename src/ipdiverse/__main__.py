"""`python -m ipdiverse`."""

from __future__ import annotations

import sys

from ipdiverse.cli import main

sys.exit(main())
