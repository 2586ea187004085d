"""Loads the extension, after checking that it fits the torch that is installed: a wrong one would fail later, with a symbol or a type that
tells nobody anything."""

from __future__ import annotations

try:
    import torch
    import torch.distributed as dist
except ImportError as error:
    raise ImportError(
        "thinwire needs PyTorch: install torch, then build thinwire against it (pip install --no-build-isolation .)"
    ) from error

from . import errors
from ._build import MPI as MPI_BUILT
from ._build import TORCH as TORCH_BUILT
from ._build import VERSION as VERSION


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split("+")[0].split(".")[:2])


def check_torch(built: str, found: str) -> None:
    """@raises ImportError if an extension built against torch ``built`` cannot work with torch ``found``."""
    if _minor(built) != _minor(found):
        raise ImportError(
            f"thinwire was built against torch {built}, but torch {found} is installed; their C++ interfaces differ. "
            "Build it again in this environment: pip install --no-build-isolation --force-reinstall --no-deps ."
        )


check_torch(TORCH_BUILT, torch.__version__)

if not dist.is_available():
    raise ImportError("thinwire needs torch.distributed, which this build of torch lacks")

from . import _C as native  # noqa: E402  torch must be loaded and checked first

native.set_error_types(errors.BY_CODE)
try:
    native.takes_store(dist.HashStore())
except TypeError as error:
    raise ImportError(
        "thinwire's extension does not know torch's types: it was compiled with another pybind11 than torch's own. Build it again with torch's headers."
    ) from error
