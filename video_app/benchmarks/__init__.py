"""Comparisons of this app in ``python -m d2_frozen.bench``: one file each, with ``main(arguments) -> dict``."""
