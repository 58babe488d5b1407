"""What makes the shipped weights and measures them; not part of what users install."""
