"""The paper's experiments as commands: ``python -m d2_frozen.study --help``. Method: arXiv 2211.02043."""
