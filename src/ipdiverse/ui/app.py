"""The page as a whole: three tabs, their look, and what happens when a visitor leaves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from ipdiverse.ui.grid import grid_tab
from ipdiverse.ui.reports import reports_tab
from ipdiverse.ui.vary import vary_tab

if TYPE_CHECKING:
    from ipdiverse.ui.installed import Installed
    from ipdiverse.ui.studio import Studio

TITLE = "ipdiverse"
CACHE_SECONDS = (600, 3600)
"""How often gradio's cache is looked through, and the age at which a file in it is deleted."""


def build(
    studio: Studio, installed: Installed, reports: dict[str, Path], waiting: int
) -> gr.Blocks:
    """The page.

    Args:
        studio: What visitors share.
        installed: What may be chosen.
        reports: From `find_reports`.
        waiting: How many drawings may wait for their turn; more are refused.
    """
    with gr.Blocks(
        title=TITLE, analytics_enabled=False, delete_cache=CACHE_SECONDS, fill_width=True
    ) as page:
        gr.Markdown("# ipdiverse\nImage prompts with variety, without losing what you asked for.")
        with gr.Tab("Vary", elem_id="tab-vary"):
            vary_tab(studio, installed)
        with gr.Tab("Grid", elem_id="tab-grid"):
            grid_tab(studio, installed)
        with gr.Tab("Reports", elem_id="tab-reports"):
            reports_tab(reports)

        def leave(request: gr.Request) -> None:
            studio.leave(request.session_hash)

        page.unload(leave)
    return page.queue(max_size=waiting, default_concurrency_limit=1, api_open=False)


def look() -> dict[str, Any]:
    """Theme, style and language of the page, as `launch` takes them. Fonts are the system's."""
    orange = gr.themes.colors.orange
    theme = gr.themes.Default(
        primary_hue=orange,
        neutral_hue=gr.themes.colors.slate,
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(
        button_primary_background_fill="#c2410c",
        button_primary_background_fill_hover="#9a3412",
        button_primary_background_fill_dark="#c2410c",
        button_primary_text_color="#ffffff",
        slider_color="#c2410c",
    )
    style = (Path(__file__).parent / "style.css").read_text("utf-8")
    return {"theme": theme, "css": style, "js": "() => { document.documentElement.lang = 'en'; }"}
