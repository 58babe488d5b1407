"""`ui`."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec

from ipdiverse.commands.console import say
from ipdiverse.errors import ArgumentError
from ipdiverse.ui import Options

PASSWORD = "IPDIVERSE_UI_PASSWORD"  # noqa: S105 - the variable's name


@dataclass(frozen=True)
class Ui:
    """Open the web page; only this machine can reach it, unless you set --host.

    Args:
        page: How it is served.
    """

    page: Options = Options()  # noqa: RUF009 - it is frozen

    def run(self) -> None:
        """Serve until Ctrl-C."""
        if find_spec("gradio") is None:
            raise ArgumentError(
                "needs gradio, which is not installed",
                where="ui",
                fix="Run `pip install -e '.[ui]'` in your copy of ipdiverse.",
            )
        from ipdiverse.ui.safety import is_loopback
        from ipdiverse.ui.server import serve

        options = self.page
        password = options.password or os.environ.get(PASSWORD, "")
        if not password and not is_loopback(options.host) and sys.stdin.isatty():
            from getpass import getpass

            password = getpass(f"password for {options.user}: ")
        serve(replace(options, password=password), lambda url: say(f"open {url} (Ctrl-C ends it)"))
