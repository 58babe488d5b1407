"""Measuring variety against fidelity: metrics, studies and reports."""
