"""The hook on a DistributedDataParallel model and its state."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ._extension import native
from .checkpoint import FORMAT, checked_states, copied
from .config import Config, as_config
from .dense_rule import all_dense
from .errors import ArgumentError, ConfigError, Error, UnsupportedError, warn
from .learning_rate import LearningRates, follow
from .onebit_adam import OneBitAdam
from .pairing import guarded_steps, paired_config
from .replay import shaped

_UNPAIRED = (
    "target=momentum puts the momentum into the gradients once the variance is frozen, and only OneBitAdam takes it for that: "
    "attach(ddp, config, OneBitAdam(...)), or HookState(config, named_parameters=..., optimizer=OneBitAdam(...))"
)
_CLOSE_MS = 5000  # how long the end of a model or of the process waits for a bucket on its way


class HookState:
    """One model's compressed all-reduce on one rank: counters, error feedback, checkpoints.

    ``attach`` makes one and installs the C++ hook. By torch's own convention it is ``ddp.register_comm_hook(HookState(config,
    named_parameters=...), thinwire.hook)``. Making it is collective over ``process_group`` (default: the default group), in the same order
    on all its ranks: it builds a Gloo group of its own, so that DDP's and your own collectives never meet its.

    ``named_parameters``: the (name, parameter) pairs that DDP reduces (``model.named_parameters()``; those without ``requires_grad`` are
    left out). Without them the parameters are learnt from the first step, whose buckets then wait for its last one; the state has no names,
    so ``state_dict()`` refuses. ``grad_scaler``: the GradScaler that scales the loss, so that the state holds unscaled gradients.
    ``optimizer``: the OneBitAdam of a config whose target is the momentum, which is refused without; or another, only checked against the config.

    A copy or a pickle holds the configuration and the state, but no process group: it reads (``state_dict()``, ``step``), but reduces
    nothing. To go on from it: ``attach(ddp, copy.config).load_state_dict(copy.state_dict())``.
    """

    def __init__(
        self,
        config: Config | str,
        process_group: dist.ProcessGroup | None = None,
        *,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]] | None = None,
        grad_scaler: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        _sparse: Collection[torch.Tensor] = (),
        _unpaired: bool = False,
    ) -> None:
        self._config = paired_config(as_config(config), optimizer)
        if optimizer is None and self._config.target.startswith("momentum") and not _unpaired:
            raise ArgumentError(_UNPAIRED)
        named = None if named_parameters is None else _named(named_parameters)
        paired = optimizer if isinstance(optimizer, OneBitAdam) else None
        if paired is not None and named is None:
            raise ArgumentError("OneBitAdam hands its momentum over by parameter: give named_parameters as well")
        self._shapes = None if named is None else {name: p.shape for name, p in named}
        self._kept: dict[str, Any] | None = None  # a copy's state, in place of an engine
        self._rates = _followed_rates(self._config, optimizer, named)
        scale = _scale_of(grad_scaler, None if named is None else named[0][1].device)
        self._group = group = _group(process_group)
        self._optimizer = paired
        if group.rank() == 0:
            for text in (*native.config_warnings(self._config), all_dense(self._config, _sizes(self._config, named or ()), group.size())):
                if text:
                    warn(text)
        store = group.get_group_store()
        # Numbers the hooks of this group: every rank counts its own, all in the same order. A refused call is not counted: whoever corrects
        # it meets the peers that wait for it.
        # A number that some rank has given up (its peers did not come in time) is nobody's: all go on to the next.
        nth = store.add(f"thinwire/hooks/{group.rank()}", 1)
        while store.check([f"thinwire/{nth}/given_up"]):
            nth = store.add(f"thinwire/hooks/{group.rank()}", 1)
        try:
            self._engine = native.Engine(store, f"thinwire/{nth}", group.rank(), group.size(), self._config, named, scale, paired is not None)
        except Exception:
            store.set(f"thinwire/{nth}/given_up", "1")
            raise
        # Exit must not find a thread of ours at work; no Python object is needed for it any more.
        self._finalizer = weakref.finalize(self, self._engine.close, _CLOSE_MS)
        guard = guarded_steps(self._config, optimizer)
        self._unguard = None if guard is None else weakref.finalize(self, guard.remove)
        if paired is not None and named is not None:
            paired._pair(self, named, _sparse)

    @property
    def config(self) -> Config:
        return self._config

    @property
    def step(self) -> int:
        """Synchronised steps seen."""
        if self._kept is not None:
            return int(self._kept["step"])
        return int(self._engine.step()) if self._engine.known() else 0

    def stats(self) -> dict[str, Any]:
        """Counters since the start and what each parameter gets now; waits for the buckets on their way.

        ``step``; ``payload_bytes`` handed to the transport, each call's send buffer once; ``wire_bytes`` that left this rank;
        ``dense_bytes`` that a ring all-reduce of the same gradients would have sent; ``factor`` = dense_bytes / wire_bytes;
        ``nonfinite_steps``; ``state_bytes``, kept between steps; ``resync_error`` once ``resynchronize()`` was called; ``parameters``: name
        -> ``numel, compressed, reason`` (why not), ``density`` (configured now), ``kept`` (entries sent at the last step), ``residual_norm,
        grad_norm`` (this rank's; under ``two_phase`` also ``server_residual_norm``, of what it holds back as an owner; with ``codec=none``
        the gradient's is taken at every 16th step; 0 for sparse and fp64 gradients, which pass by), ``momentum_norm``,
        ``residual_over_momentum`` (residual_norm / momentum_norm) and ``masked`` (elements whose frozen variance is 0) where the target is
        the momentum; ``frozen``: whether it is compressed by now. Of a codec ``measured_delta``, at every 64th step (under
        ``feedback=none`` on the CPU alone); of EF21 and EControl also ``estimate_norm``, ``stale`` (‖g − h‖/‖g‖; with ``worker_ema`` of
        the average); of EControl ``eta`` and ``eta_cuts``, how often the watchdog has lowered it. With OneBitAdam ``freeze``: ``step`` and
        ``reason``, once it has frozen, and ``max_update``, the largest update seen since, in units of the learning rate.
        """
        stats = dict(self._live("stats").stats())
        self._tell()
        if self._optimizer is not None:
            stats["freeze"] = self._optimizer._freeze_stats()
        return stats

    def state_dict(self) -> dict[str, Any]:
        """This rank's state: tensors keyed by parameter name, independent of buckets. Between steps; save it on every rank, as it differs
        between ranks."""
        shapes = self._shapes
        if shapes is None:
            raise ArgumentError(
                "this HookState was made without named_parameters, so its state has no names by which another process could find it; "
                "use attach(), or HookState(..., named_parameters=model.named_parameters())"
            )
        if self._kept is not None:
            return copied(self._kept)
        state = self._engine.state()
        layouts = dict(zip(shapes, self._engine.layouts(), strict=True))
        state["parameters"] = {name: shaped(arrays, shapes[name], layouts[name]) for name, arrays in state["parameters"].items()}
        if any(layouts.values()):  # owned parts are cut by place
            state["layouts"] = {name: layout for name, layout in layouts.items() if layout}
        if self._rates is not None:
            state["lr"] = dict(self._rates.last)
        return {"format": FORMAT, **state}

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Takes this rank's own ``state_dict()``, or the sequence of all old ranks' dicts, which another world size needs. Between steps,
        on all ranks.

        With another world size every new rank gets the mean over the old ranks: the mean is what the output divides by. Names or shapes
        that do not fit are refused, and nothing has changed then.
        """
        engine = self._live("load_state_dict")
        shapes = self._shapes
        if shapes is None:
            raise ArgumentError("this HookState was made without named_parameters, so it cannot tell whose state it is given")
        try:
            states = checked_states(state, shapes)
        except ArgumentError as error:
            # The peers compare what they are about to load, and refuse with this rank's reason.
            with contextlib.suppress(Error):
                engine.load_state([], refused=str(error))
            raise
        layouts = states[0].get("layouts", {})
        engine.load_state(states, [list(layouts.get(name, ())) for name in shapes])
        if self._rates is not None:
            self._rates.last = dict(states[0].get("lr", {}))
        if self._optimizer is not None and self._optimizer.frozen and engine.frozen():
            self._optimizer._hand_over(momenta=False)

    def on_lr_change(self, ratio: float | Mapping[str, float]) -> None:
        """The learning rate has become ``ratio`` times what it was, of all parameters or by name: what was not sent is divided by it, so
        that it moves the parameters as far as it would have. Between steps, on all ranks alike. Under ``feedback=ef14:lr_rescale=1``
        it is called for you."""
        engine = self._live("on_lr_change")
        if self._shapes is None:
            raise ArgumentError("on_lr_change: this HookState was made without named_parameters")
        by_name = dict(ratio) if isinstance(ratio, Mapping) else dict.fromkeys(self._shapes, ratio)
        for name, value in by_name.items():
            if name not in self._shapes:
                raise ArgumentError(f"on_lr_change: {name!r} is not a parameter here")
            if not (isinstance(value, (int, float)) and 0 < value < math.inf):
                raise ArgumentError(f"on_lr_change: the ratio of {name!r} is {value!r}, not a positive number")
        engine.rescale_residuals([1.0 / by_name.get(name, 1.0) for name in self._shapes])

    def flush(self) -> None:
        """Makes the next synchronised step dense, so that it empties the residuals. Call it on all ranks."""
        self._live("flush").flush()

    def resynchronize(self) -> None:
        """EF21 and EControl: makes the mean estimate H the mean of the ranks' estimates again, without what fp32 rounding has moved it by;
        of other configs nothing changes. Before a checkpoint of a long run. Collective: between steps, on all ranks at the same step.
        ``stats()["resync_error"]`` is the distance that H has moved, relative to its norm."""
        self._live("resynchronize").resynchronize()

    def reset(self) -> None:
        """Empties all state and counters, not the step. Between steps, on all ranks; under EF21 and EControl they wait for each other, and
        the estimates are started anew."""
        self._live("reset").reset()

    def close(self) -> None:
        """Ends the hook's thread and group; idempotent. A backward pass with a closed hook raises; step, stats() and state_dict() stay.
        After a lost peer or a corrupt payload only stats() does: the ranks are in the midst of a step, and the last checkpoint is what
        there is to go on from."""
        if self._kept is None:
            self._finalizer()
            if self._unguard is not None:
                self._unguard()
            self._tell()
            if self._optimizer is not None:
                self._optimizer._unpair(self)

    def __getstate__(self) -> dict[str, Any]:
        kept = self._kept
        if kept is None and self._shapes is not None:
            kept = self.state_dict()
        if kept is None and self.step > 0:
            raise ArgumentError(
                "this HookState cannot be copied: it has state but was made without named_parameters, so the copy could not say whose it is"
            )
        return {"config": str(self._config), "shapes": self._shapes, "kept": kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._config = Config.parse(state["config"])
        self._shapes = state["shapes"]
        self._rates = None
        self._kept = state["kept"] or {"step": 0}  # made without names and never used: there is no state to give
        self._engine = None
        self._optimizer = None
        self._unguard = None

    def __repr__(self) -> str:
        return f"HookState('{self._config}'{', a copy without process group' if self._kept is not None else ''})"

    def _tell(self) -> None:
        """What the watchdog did in the last step; of earlier ones the bucket after them has told."""
        if notice := self._engine.take_notice():
            warn(notice)

    def _live(self, what: str) -> Any:
        if self._kept is not None:
            raise ArgumentError(
                f"{what}: this HookState is a copy, which has no process group; attach a new one and load_state_dict(copy.state_dict()) into it"
            )
        return self._engine


def hook(state: HookState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The hook by torch's convention: ``ddp.register_comm_hook(state, thinwire.hook)``. The same engine as ``attach`` installs, with the
    GIL taken once per bucket."""
    engine = state._live("hook")
    if state._rates is not None and bucket.index() == 0 and (ratios := state._rates.changed()):  # the step before is over
        state.on_lr_change(ratios)
    return engine.submit(bucket)


# torch compares these as objects, not as the strings that the future import makes of them.
hook.__annotations__ = {"state": HookState, "bucket": dist.GradBucket, "return": torch.futures.Future[torch.Tensor]}


def attach(
    ddp: DistributedDataParallel,
    config: Config | str,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    grad_scaler: Any = None,
) -> HookState:
    """Installs the C++ hook on ``ddp``, before its first backward pass; no GIL is taken in the backward pass. Collective over the model's
    process group.

    ``optimizer``: the one that will apply the gradients; it is only checked against the config: ``feedback=dgc`` has the momentum in the
    hook, so it takes ``optim.DGCSGD`` or SGD without momentum; ``target=momentum`` takes ``optim.OneBitAdam``, and is paired with it.
    ``grad_scaler``: see HookState. @raises ConfigError, Error, with nothing changed.
    """
    config = as_config(config)
    _check_model(ddp)
    if optimizer is None and config.target.startswith("momentum"):
        raise ArgumentError(_UNPAIRED)
    named = _reduced_by(ddp)
    if isinstance(optimizer, torch.optim.Optimizer) and not isinstance(optimizer, OneBitAdam):  # which says more
        applied = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in applied for _, p in named):
            raise ArgumentError("the optimizer has none of the parameters that DDP reduces: it is another model's; make it of ddp.parameters()")
    state = HookState(config, ddp.process_group, named_parameters=named, grad_scaler=grad_scaler, optimizer=optimizer, _sparse=_sparse_in(ddp))
    try:
        native.install(ddp.reducer, state._engine)
    except Exception:
        state.close()
        raise
    if state._rates is not None:
        follow(ddp, state._rates, state.on_lr_change)
    ddp.logger._set_comm_hook_name(f"thinwire.attach({state.config})")
    ddp._comm_hooks.append((hook, state))
    weakref.finalize(ddp, state.close)
    return state


def _followed_rates(config: Config, optimizer: Any, named: list[tuple[str, torch.nn.Parameter]] | None) -> LearningRates | None:
    if config.keys_of("feedback").get("lr_rescale") != "1":
        return None
    if optimizer is None or named is None:
        raise ConfigError(
            "feedback=ef14:lr_rescale=1 follows the optimizer's learning rate, parameter by parameter: attach(ddp, config, optimizer), or "
            "HookState(config, named_parameters=..., optimizer=...)"
        )
    return LearningRates(optimizer, named)


def _sizes(config: Config, named: Iterable[tuple[str, torch.nn.Parameter]]) -> set[int]:
    """Of the parameters that a codec may compress; one that is too large for it is refused later."""
    return {p.numel() for _, p in named if p.dim() >= 2 and max(1, config.min_numel) <= p.numel() < 2**32}


def _group(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    if process_group is None:
        if not dist.is_initialized():
            raise ArgumentError("no process group: call torch.distributed.init_process_group first, or give process_group")
        process_group = dist.group.WORLD
    if not isinstance(process_group, dist.ProcessGroup):
        raise ArgumentError(f"process_group is {process_group!r}: this process is not a member of that group")
    if not dist.is_gloo_available():
        raise UnsupportedError("this build of torch has no Gloo, over which the hook sends its payloads")
    return process_group


def _named(pairs: Iterable[tuple[str, torch.nn.Parameter]]) -> list[tuple[str, torch.nn.Parameter]]:
    """All that is wrong with one rank's pairs alone is found here, before the group hears of the hook."""
    named: list[tuple[str, torch.nn.Parameter]] = []
    first: dict[int, str] = {}
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], torch.Tensor)):
            raise ArgumentError(
                f"named_parameters must yield (name, parameter) pairs as model.named_parameters() does, not {type(pair).__name__}"
            )
        if not pair[1].requires_grad:
            continue
        if pair[0] in first.values():
            raise ArgumentError(f"named_parameters: two parameters are called {pair[0]!r}")
        if first.setdefault(id(pair[1]), pair[0]) != pair[0]:
            raise ArgumentError(f"named_parameters: {pair[0]!r} is {first[id(pair[1])]!r} under another name; name tied parameters once")
        named.append(pair)
    if not named:
        raise ArgumentError("named_parameters: there is no parameter that requires gradients")
    return named


def _reduced_by(ddp: DistributedDataParallel) -> list[tuple[str, torch.nn.Parameter]]:
    """The parameters in DDP's own reducer under the module's own names; tied ones once, under the first name; those that DDP is told to
    ignore left out."""
    names: dict[int, str] = {}
    for name, parameter in ddp.module.named_parameters():
        names.setdefault(id(parameter), name)
    return [(names[id(p)], p) for p in dict.fromkeys(ddp._module_parameters) if p.requires_grad]


def _sparse_in(ddp: DistributedDataParallel) -> set[torch.Tensor]:
    """The parameters whose gradients will be sparse, found as DDP itself finds them."""
    return {module.weight for module in ddp.module.modules() if isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag)) and module.sparse}


def _scale_of(grad_scaler: Any, device: torch.device | None) -> torch.Tensor | None:
    """The scaler's scale, which the hook reads without Python. ``device``: of the gradients; None: not known yet."""
    if grad_scaler is None:
        return None
    try:
        if not grad_scaler.is_enabled():
            return None
        # The first scale() makes it, where the loss is; from then on it is the same tensor for ever.
        if grad_scaler._scale is None:
            grad_scaler._lazy_init_scale_growth_tracker(torch.device(grad_scaler._device) if device is None else device)
        scale = grad_scaler._scale
    except AttributeError as error:
        raise UnsupportedError(f"grad_scaler is a {type(grad_scaler).__name__}, which is no torch.amp.GradScaler") from error
    if not isinstance(scale, torch.Tensor):
        raise ArgumentError(f"grad_scaler: its scale must be a tensor, not a {type(scale).__name__}")
    near = scale.device.type == "cpu" or (scale.device == device if device is not None else scale.device.type == "cuda")
    if not near or scale.dtype != torch.float32 or scale.numel() != 1:
        where = "the CPU" if device is not None and device.type == "cpu" else f"the CPU or {device or 'a GPU'}"
        raise ArgumentError(
            f"grad_scaler: its scale must be one float32 on {where}, where gradients are reduced, not {scale.numel()} {scale.dtype} on {scale.device}"
        )
    return scale


def _check_model(ddp: Any) -> None:
    if not isinstance(ddp, DistributedDataParallel):
        what = type(ddp).__name__
        if hasattr(ddp, "_orig_mod"):
            what = "compiled module; attach to the DistributedDataParallel model before torch.compile"
        raise ArgumentError(f"attach needs a DistributedDataParallel model, not a {what}")
    if ddp._use_python_reducer:
        raise ArgumentError(
            "this model uses DDP's Python reducer (torch._dynamo.config.optimize_ddp='python_reducer'), which runs no hook in C++"
        )
    if ddp.mixed_precision is not None:
        raise ArgumentError(
            "DistributedDataParallel(mixed_precision=...) installs a hook of its own; cast the model or use torch.autocast instead"
        )
    # A deep copy of a model holds its pair of hook and state, but its reducer has no hook: the state is a copy then too.
    ddp._comm_hooks[:] = [pair for pair in ddp._comm_hooks if not (isinstance(pair[1], HookState) and pair[1]._kept is not None)]
    if ddp._comm_hooks:
        raise ArgumentError(f"this model has a communication hook already ({ddp._comm_hooks[0][0].__qualname__}); DDP takes one")
    if any(hasattr(p, "_in_backward_optimizers") for p in ddp._module_parameters):
        raise ArgumentError("this model applies its optimizer in the backward pass, before the gradients are reduced")
    if ddp.device_type not in ("cpu", "cuda"):
        raise UnsupportedError(f"the model is on {ddp.device}: gradients are reduced on the CPU or on CUDA's GPUs")
    refusal = native.device_info()["refusal"] if ddp.device_type == "cuda" else ""
    if refusal:
        raise UnsupportedError(f"the model is on {ddp.device}: {refusal}")
