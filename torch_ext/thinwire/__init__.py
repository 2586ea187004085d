"""thinwire: compressed gradient exchange for distributed training.

>>> state = thinwire.attach(ddp, "dgc:density=0.001", optimizer)

makes a DistributedDataParallel model send 0.1 % of its gradients, with momentum correction and error feedback. ``Config`` says what can be
chosen, ``replay`` shows what a choice does to recorded gradients, ``HookState.stats()`` what it did to yours.
"""

from __future__ import annotations

from . import _extension  # first: checks torch before anything loads the extension
from . import optim
from .config import Config, dgc, econtrol, error_feedback, onebit_adam
from .errors import ConfigError, Error
from .hook import HookState, attach, hook
from .info import build_info
from .replay import Replay, replay

__version__: str = _extension.VERSION

__all__ = [
    "Config",
    "ConfigError",
    "Error",
    "HookState",
    "Replay",
    "attach",
    "build_info",
    "dgc",
    "econtrol",
    "error_feedback",
    "hook",
    "onebit_adam",
    "optim",
    "replay",
]
