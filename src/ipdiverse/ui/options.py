"""How the page is served: what the command line asks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """How the page is served.

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
