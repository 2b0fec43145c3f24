"""Detection on the frozen pyramid: boxes and masks."""
