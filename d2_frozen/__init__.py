"""d2_frozen: train task heads on frozen image backbones, the Detectron2 way.

Importing it makes ``import detectron2`` work (an installed one, else the embedded engine).
Heavy modules register themselves when ``add_frozen_config`` is called.
"""

import warnings

from d2_frozen.provider import engine_name, provide_detectron2

provide_detectron2()
# fvcore scripts a loss when it is imported, and newer torch says so at the head of every command. It is the last of the
# filters, so that -W and PYTHONWARNINGS decide before it.
warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", FutureWarning, append=True)

from d2_frozen.config import add_frozen_config, register_config  # noqa: E402  (needs detectron2)

__version__ = "0.1.0"
__all__ = ["__version__", "add_frozen_config", "engine_name", "register_config"]
