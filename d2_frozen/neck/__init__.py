"""Necks: bottom-up maps in, pyramid out."""
