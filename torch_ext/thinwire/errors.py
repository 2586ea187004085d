"""One exception with a code; subclasses only say which code in their type. And how a warning is given."""

from __future__ import annotations

import sys
import warnings


def warn(text: str) -> None:
    """At the line of the program that led here: a scheduler, a GradScaler or torch's wrappers of ``step`` may lie between."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("thinwire", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


class Error(RuntimeError):
    """What went wrong is in the text, which kind it is in ``code``.

    After ``corrupt_payload, peer_lost, timeout`` or ``transport`` the hook's group is gone: every later step raises the same error; build a
    new process group and attach again. After ``invalid_config`` and ``invalid_argument`` nothing has changed.
    """

    code: str = "internal"


class ConfigError(Error, ValueError):
    """A configuration was refused; the text says what was given, where, and what is allowed."""

    code = "invalid_config"


class ArgumentError(Error, ValueError):
    code = "invalid_argument"


class CorruptPayloadError(Error):
    code = "corrupt_payload"


class PeerLostError(Error):
    code = "peer_lost"


class TimeoutError(Error):
    code = "timeout"


class TransportError(Error):
    code = "transport"


class DeviceError(Error):
    code = "device"


class UnsupportedError(Error):
    code = "unsupported"


class InternalError(Error):
    code = "internal"


BY_CODE: dict[str, type[Error]] = {
    cls.code: cls
    for cls in (
        ConfigError,
        ArgumentError,
        CorruptPayloadError,
        PeerLostError,
        TimeoutError,
        TransportError,
        DeviceError,
        UnsupportedError,
        InternalError,
    )
}
