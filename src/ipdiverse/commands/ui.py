"""`ui`."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec

from ipdiverse.commands.printing import say
from ipdiverse.errors import ArgumentError

PASSWORD = "IPDIVERSE_UI_PASSWORD"  # noqa: S105 - the variable's name


@dataclass(frozen=True)
class Ui:
    """Open the web page, on this machine alone unless told otherwise.

    Args:
        host: What to listen on; any but this machine's own needs a password.
        port: Port to listen on.
        user: Name to log in with, where there is a password.
        password: To log in with; better in the environment variable IPDIVERSE_UI_PASSWORD, which
            other users of this machine cannot see. On a terminal it is asked for.
        reports: Folders that are searched for reports of `evaluate`.
        bases: More bases to offer: folders and single files.
        adapters: More adapters to offer: files and folders.
        waiting: How many drawings may wait for their turn; more are told to come back.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    user: str = "ipdiverse"
    password: str = ""
    reports: tuple[str, ...] = ("out",)
    bases: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    waiting: int = 8

    def run(self) -> None:
        """Serve until Ctrl-C."""
        if find_spec("gradio") is None:
            raise ArgumentError(
                "needs gradio, which is not installed",
                where="ui",
                fix="Install it: pip install 'ipdiverse[ui]'.",
            )
        from ipdiverse.ui.safety import is_loopback
        from ipdiverse.ui.server import Options, serve

        password = self.password or os.environ.get(PASSWORD, "")
        if not password and not is_loopback(self.host) and sys.stdin.isatty():
            from getpass import getpass

            password = getpass(f"password for {self.user}: ")
        options = Options(
            self.host,
            self.port,
            self.user,
            password,
            self.reports,
            self.bases,
            self.adapters,
            self.waiting,
        )
        serve(options, lambda url: say(f"open {url} (Ctrl-C ends it)"))
