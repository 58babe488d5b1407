"""Adapters as files: reading any layout, writing, inspecting, publishing."""
