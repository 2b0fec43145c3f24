"""The embedded engine: an independent, pip-only implementation of a subset of Detectron2's API.

See README.md beside this file for what is in the subset and where it differs on purpose.
"""

from detectron2._outside import explain_missing_modules

# The release whose behaviour is implemented; projects compare against it.
__version__ = "0.6"
# Tells this engine from the original without looking at paths.
EMBEDDED_IN = "d2_frozen"

explain_missing_modules()
