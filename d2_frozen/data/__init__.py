"""Data by config, augmentation, and the generated world."""
