"""What ``python -m d2_frozen.bench`` measures: one file per comparison, and what they share (measuring.py)."""
