"""Adam until its variance is frozen, then the half of 1-bit Adam that is not in the hook."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import AdamW

from ._extension import native
from .errors import ArgumentError, warn
from .onebit_checks import REFUSED, betas_of, changed_beta, check_freeze, check_group, check_within, checked_freeze, refuse_sparse, risen_rate, settings_of, unhooked
from .replay import flattened
from .variance import WITHIN, VarianceWatch, bits, names_of, raised

if TYPE_CHECKING:
    from .hook import HookState

_LOOK_EVERY = 16  # steps between looks at the largest update on a GPU
_NEVER = 2**64 - 1
_AVERAGED = (torch.float32, torch.bfloat16, torch.float16)  # gradients of other types come back as their mean, always


class OneBitAdam(AdamW):
    """AdamW (Adam where ``weight_decay`` is 0) until the variance is frozen; afterwards 1-bit Adam with the momentum that the hook averages.

    Before the freeze every step is torch's AdamW on the mean gradient, to the bit. At the freeze the momentum is handed to the hook, and from
    the next backward pass on ``p.grad`` of the tensors that it compresses holds the averaged momentum m:

        w ← w − lr·(weight_decay·w + m / (1 − beta1^t) / (sqrt(v / (1 − beta2^T)) + eps))

    with v and its correction frozen at T. Coordinates with v = 0 are masked: 1 bit cannot send their 0, so the hook leaves them out and m is
    0 there and they never move again, but for the weight decay. Those whose gradients were merely rare would get updates of thousands of times the learning rate, since m is ± a scale of its
    block: with more than one rank sqrt(v) is raised to at least ``floor`` times its mean over the tensor (0: as it is). Tensors that the hook
    keeps dense go on with exact AdamW.

    ``freeze``: ``"auto"``: once the L1 norm of the variance has changed by at most 4 % over 1/(1 - beta2) steps, in sum and in 90 % of the
    tensors, at the earliest after twice as many steps and after ``not_before`` (finish a learning rate's warm-up first: v is still moving),
    at the latest after ``not_after`` steps, if it is given: a quarter of a short training, in which v never settles.
    A number: after so many synchronised steps, which have to lie within these bounds. None: what the config says; a number, in either, counts more than "auto". Gradient clipping belongs to the config's ``clip_norm``:
    ``clip_grad_norm_`` would clip the momentum after the freeze.

    Pass it to ``attach(ddp, "onebit_adam", optimizer)``; without a hook it is AdamW. Save both ``state_dict()``s, the hook's on every rank.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        freeze: str | int | None = None,
        *,
        not_before: int = 0,
        not_after: int | None = None,
        floor: float = native.VARIANCE_FLOOR,
        foreach: bool | None = None,
        **adamw: Any,
    ) -> None:
        check_freeze(freeze, not_before, not_after, floor)
        unknown = [name for name in adamw if name not in REFUSED]
        if unknown:
            raise TypeError(f"OneBitAdam.__init__() got an unexpected keyword argument {unknown[0]!r}")
        check_group({"eps": eps, "betas": betas, **adamw})
        self.freeze = freeze
        self.not_before = not_before
        self.not_after = not_after
        self.floor = floor
        self._hook: HookState | None = None
        self._said_betas: tuple[str, ...] = ()  # those that a warning said were changed after the freeze
        self._averaged: dict[torch.Tensor, tuple[int, str]] = {}  # parameters that the hook compresses: their places among its parameters, and names
        self._named: list[tuple[str, torch.Tensor]] = []  # the hook's parameters
        self._watch: VarianceWatch | None = None  # freeze=auto
        self._freeze_from = _NEVER
        self._seen: tuple[int, int, list[float]] | None = None  # of a watch that is yet to be
        self._frozen: dict[str, Any] = {}  # when, why, at which rates, how large updates got, whether the variances have their floor
        self._largest: torch.Tensor | None = None  # update since that was last noted
        self._unread = 0  # steps since then
        self._rates: list[float] = []  # of the last step
        self._since_rise: int | None = None  # steps since one of them rose; None: none ever did
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, foreach=foreach)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        check_group(param_group)
        super().add_param_group(param_group)

    # ---- with the hook ------------------------------------------------------------------------------------------------------------------

    def _pair(self, hook: HookState, named: Sequence[tuple[str, torch.nn.Parameter]], sparse: Collection[torch.Tensor] = ()) -> None:
        """Called by the hook: this optimizer's momentum becomes its at the freeze. Those with `sparse` gradients pass by it: they may be another
        optimizer's."""
        if self._hook is not None and self._hook is not hook:
            raise ArgumentError("this OneBitAdam belongs to another hook; make one optimizer per model, or close() the other hook first")
        mine = {p for group in self.param_groups for p in group["params"]}
        averaged = {p: (i, name) for i, (name, p) in enumerate(named) if hook._engine.averages(i) and p.dtype in _AVERAGED}
        averaged = {p: at for p, at in averaged.items() if p in mine or p not in sparse}
        strange = [name for p, (_, name) in averaged.items() if p not in mine]
        if strange:
            raise ArgumentError(
                f"OneBitAdam does not have parameters whose momentum the hook averages: {names_of(strange)}. Only those with sparse gradients may be "
                "another optimizer's; attach() knows them by their nn.Embedding(sparse=True)"
            )
        if not averaged:
            self._warn(
                f"none of the {len(named)} tensors is compressed: all have fewer than two dimensions, fewer elements than min_numel={hook.config.min_numel}, "
                "or another dtype. The variance is never frozen, and every step is dense; lower min_numel if it is that",
                hook,
            )
        self._hook, self._averaged, self._named = hook, averaged, list(named)
        freeze = hook.config.keys_of("target")["freeze"]
        self._watch = None
        self._freeze_from = _NEVER if self.not_after is None else self.not_after
        if freeze != "auto":
            self._freeze_from = int(freeze)
        else:
            self._watch = VarianceWatch(self._memory(), self.not_before)
            self._watch.seen, self._seen = self._seen, None
        self._raise_variances()
        self._describe()

    def _check_config(self, freeze: str) -> None:
        """@raises ArgumentError where the config's step is not within this optimizer's bounds."""
        if freeze != "auto":
            check_within(f"the config's freeze={freeze}", int(freeze), self.not_before, self.not_after)

    def _unpair(self, hook: HookState) -> None:
        """Called by the hook when it is closed: another may come."""
        if self._hook is hook:
            self._hook, self._averaged, self._named = None, {}, []
            self._seen = None if self._watch is None else self._watch.seen

    @property
    def frozen(self) -> bool:
        """Whether the variance is frozen."""
        return any("frozen_step" in self.state[p] for group in self.param_groups for p in group["params"] if p in self.state)

    def _describe(self) -> None:
        """To the hook, so that the ranks find out in what their optimizers differ before they wait for each other."""
        if self._hook is None:
            return
        every = 0 if self._watch is None else self._watch.every
        words = f"OneBitAdam(freeze={'auto' if self._watch else self._freeze_from}, not_before={self.not_before}, not_after={self.not_after}, floor={self.floor:g})"
        if self._watch is not None:
            words += f" that looks every {every} steps"
        words += f", {'frozen' if self.frozen else 'not frozen'}; {settings_of(self.param_groups, self._named)}"
        self._hook._engine.describe_optimizer(words, self._freeze_from, every, WITHIN)

    def _hand_over(self, *, momenta: bool) -> None:
        """Momenta (once), masks and beta1s to the hook."""
        assert self._hook is not None
        given: list[tuple[torch.Tensor | None, torch.Tensor | None, float]] = [(None, None, 0.0)] * len(self._named)
        layouts = self._hook._engine.layouts()
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p] if p in self.state else {}
                if p not in self._averaged:
                    if "frozen_step" in state:
                        raise ArgumentError(f"OneBitAdam: a parameter of shape {tuple(p.shape)} is frozen, but the hook keeps it dense: min_numel was another")
                    continue
                place, name = self._averaged[p]
                if not momenta and "frozen_step" not in state:
                    raise ArgumentError(f"OneBitAdam: the hook compresses {name!r}, which is not frozen in this state: min_numel was another")
                layout = layouts[place]  # the hook keeps them as the gradients lie in DDP's buckets
                given[place] = (
                    flattened(state["exp_avg"], layout) if momenta else None,
                    bits(flattened(state["exp_avg_sq"] != 0, layout)),
                    betas_of(state, group)[0],
                )
        self._hook._engine.freeze(given)

    # ---- steps --------------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; @returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            check_group(group)  # what was changed in it since
        self._note_rates()
        frozen = self.frozen
        self._check_stage(frozen)
        refuse_sparse(self.param_groups, self._named)
        adamw = unhooked(AdamW.step)
        if not frozen:
            adamw(self)
            self._freeze_if_time()
            return loss
        grads = {p: p.grad for p in self._averaged if p.grad is not None}
        for p in grads:
            p.grad = None  # the rest is AdamW's
        try:
            adamw(self)
        finally:
            for p, grad in grads.items():
                p.grad = grad
        self._check_betas()
        for group in self.param_groups:
            self._apply_momentum(group, {p: grads[p] for p in group["params"] if p in grads})
        self._look_at_updates()
        return loss

    def _check_betas(self) -> None:
        """The hook's share of the old momentum and v's correction are those of the freeze: whoever changes a beta is told so, once for each."""
        for name in ("beta1", "beta2"):
            if name not in self._said_betas and (words := changed_beta(name, self.param_groups, self._averaged, self.state)):
                self._said_betas += (name,)
                self._warn(words)

    def _note_rates(self) -> None:
        rates = [float(group["lr"]) for group in self.param_groups]
        if any(now > then for now, then in zip(rates, self._rates, strict=False)):
            self._since_rise = 0
        elif self._since_rise is not None:
            self._since_rise += 1
        self._rates = rates
        if words := risen_rate(self._frozen, rates, self.param_groups, self._averaged):
            self._frozen["rates"] = None
            self._warn(words)

    def _memory(self) -> int:
        """Steps that v remembers, 1 / (1 − beta2), where the hook averages the momentum."""
        betas2 = [float(group["betas"][1]) for group in self.param_groups if any(p in self._averaged for p in group["params"])]
        return max(1, round(1 / (1 - max(betas2, default=0.0))))

    def _check_stage(self, frozen: bool) -> None:
        """The optimizer and its hook are frozen both or neither: one that was loaded without the other would take gradients for momenta."""
        if self._hook is None:
            if frozen:
                raise ArgumentError(
                    "this OneBitAdam is frozen and has no hook, where its momentum is: it was closed, or this is a copy. Attach one and load the hook's state_dict()"
                )
            return
        if frozen == self._hook._engine.frozen():
            return
        if frozen:
            raise ArgumentError("this optimizer's variance is frozen, but the hook still sends gradients: load the hook's state_dict() as well")
        raise ArgumentError("the hook sends momenta, but this optimizer's variance is not frozen: load the optimizer's state_dict() as well")

    def _apply_momentum(self, group: dict[str, Any], momenta: Mapping[torch.Tensor, torch.Tensor]) -> None:
        lr, decay = float(group["lr"]), group["weight_decay"]
        for p, m in momenta.items():
            state = self.state[p]
            beta1, beta2 = betas_of(state, group)
            state["step"] += 1
            t = float(state["step"])
            denominator = state["exp_avg_sq"].sqrt().div_((1 - beta2 ** state["frozen_step"]) ** 0.5).add_(group["eps"])
            if decay != 0:
                p.mul_(1 - lr * decay)
            p.addcdiv_(m, denominator, value=-lr / (1 - beta1**t))
            if m.numel() == 0:
                continue
            largest = torch.div(m, denominator, out=denominator).abs_().max() / (1 - beta1**t)  # in memory that is at hand
            self._largest = largest if self._largest is None else torch.fmax(self._largest, largest)

    def _look_at_updates(self, *, wait: bool = False) -> None:
        """Takes note of the largest update. Reading it from a GPU waits for the GPU, so that is left to every 16th step, or to `wait`."""
        if self._largest is None:
            return
        self._unread += 1
        if self._largest.is_cuda and not wait and self._unread < _LOOK_EVERY:
            return
        largest, self._largest, self._unread = float(self._largest), None, 0
        warned = self._frozen.get("max_update", 0.0) > native.UNUSUAL_UPDATE
        self._frozen["max_update"] = max(self._frozen.get("max_update", 0.0), largest)
        if largest > native.UNUSUAL_UPDATE and not warned:
            self._warn(
                f"an update of {largest:.3g} times the learning rate by step {self._taken()}; Adam's are about 1. The variance was frozen at step "
                f"{self._frozen.get('step', '?')}, probably before it was stable where gradients are rare: freeze later, or keep such tensors dense (min_numel)"
            )

    def _taken(self) -> int:
        """Steps of this optimizer: those that a grad scaler skipped are not among them."""
        return max((int(state["step"]) for p in self._averaged if (state := self.state.get(p))), default=0)

    def _freeze_stats(self) -> dict[str, Any]:
        self._look_at_updates(wait=True)
        return {key: self._frozen[key] for key in ("step", "reason", "max_update") if key in self._frozen}

    # ---- the freeze ---------------------------------------------------------------------------------------------------------------------

    def _freeze_if_time(self) -> None:
        if self._hook is None or not self._averaged:
            return
        step = self._hook.step  # synchronised steps: a skipped one counts, as it does for the hook
        reason = ""
        if self._watch is not None:
            taken = self._taken()
            stable = self._watch.due(step, taken) and self._watch.look(step, taken, self._norms())
            reason = self._watch.words if stable else ""
            if not stable and self.not_after is None and self._watch.impatient(step, taken):
                self._warn(
                    f"after {step} steps everything is still dense: {self._watch.words or 'no two looks to compare'}. freeze=auto waits until v is stable, in this "
                    "training perhaps for ever; OneBitAdam(..., not_after=STEPS) or freeze=STEP freezes at the latest then"
                )
        if not reason and step >= self._freeze_from:
            reason = f"freeze={self._freeze_from}" if self._watch is None else f"not_after={self.not_after}"
        if reason:
            self._freeze(step, reason)

    def _warn(self, text: str, hook: HookState | None = None) -> None:
        """Once for the group: m, v and the learning rates are equal on all ranks."""
        hook = hook or self._hook
        if hook is None or hook._group.rank() == 0:
            warn(f"OneBitAdam: {text}")

    def _norms(self) -> list[float]:
        """Of the bias-corrected variances; 0 where there was no gradient so far."""
        beta2 = {p: float(group["betas"][1]) for group in self.param_groups for p in group["params"]}
        out = []
        for p in self._averaged:
            state = self.state[p]
            norm = float(state["exp_avg_sq"].abs().sum(dtype=torch.float64)) / (1 - beta2[p] ** int(state["step"])) if state else 0.0
            out.append(norm)
        return out

    def _freeze(self, step: int, reason: str) -> None:
        assert self._hook is not None
        if warms_up := self._since_rise is not None and self._since_rise < self._memory():
            self._warn(
                f"the variance is frozen at step {step}, and the learning rate last rose {self._since_rise} steps before; v remembers 1/(1 - beta2) = "
                f"{self._memory()} steps, so it is that of the warm-up. Freeze later: OneBitAdam(..., not_before=STEPS), or a later freeze=STEP"
            )
        for p in self._averaged:
            if not self.state[p]:  # no gradient so far: m and v are 0
                self.state[p].update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        dead = [name for p, (_, name) in self._averaged.items() if not bool(self.state[p]["exp_avg_sq"].any())]
        if dead:
            self._warn(
                f"at the freeze, step {step}, these have had no gradient: {names_of(dead)}. Their v = 0 masks them: but for the weight decay "
                "they never move again. Freeze later, or keep them dense (min_numel)"
            )
        for group in self.param_groups:
            for p in self._averaged.keys() & set(group["params"]):
                self.state[p]["beta1"], self.state[p]["beta2"] = (float(beta) for beta in group["betas"])
        self._hand_over(momenta=True)
        for p in self._averaged:
            state = self.state[p]
            state["frozen_step"] = max(1, int(state["step"]))
            del state["exp_avg"]  # the hook's from now on
        self._frozen = {"step": step, "reason": reason, "rates": None if warms_up else list(self._rates)}  # None: a warning said that they rise
        self._raise_variances()
        self._describe()

    def _raise_variances(self) -> None:
        """To their floor, once in a training's life, where m is ± a scale. With one rank m is exact, and a rare gradient's own."""
        if self._hook is None or not self.frozen or self._frozen.get("raised") or self.floor == 0 or self._hook._group.size() == 1:
            return
        for p in self._averaged:
            state = self.state.get(p, {})
            if "frozen_step" in state:
                state["exp_avg_sq"] = raised(self.floor, state["exp_avg_sq"])
        self._frozen["raised"] = True

    # ---- state --------------------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        self._look_at_updates(wait=True)
        seen = self._seen if self._watch is None else self._watch.seen
        freeze = {"frozen": dict(self._frozen), "seen": seen, "rates": list(self._rates), "since_rise": self._since_rise}
        return {**super().state_dict(), "freeze": freeze}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        given = dict(state_dict)
        freeze = checked_freeze(given.pop("freeze", {"frozen": {}, "seen": None}))
        for group in given.get("param_groups", []):
            check_group(group)
        super().load_state_dict(given)
        self._frozen = dict(freeze["frozen"])
        if self._watch is None:
            self._seen = freeze["seen"]
        else:
            self._watch.remember(self._memory())  # the groups' betas are those of the state
            self._watch.seen = freeze["seen"]
        self._rates, self._since_rise, self._largest = list(freeze.get("rates", [])), freeze.get("since_rise"), None
        if self._hook is not None and self.frozen and self._hook._engine.frozen():
            self._hand_over(momenta=False)
        self._raise_variances()
        self._describe()

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no hook: its numbers and state only."""
        own = {name: getattr(self, name) for name in ("freeze", "not_before", "not_after", "floor", "_rates", "_since_rise", "_largest", "_unread", "_said_betas")}
        seen = self._seen if self._watch is None else self._watch.seen
        alone = {"_hook": None, "_averaged": {}, "_named": [], "_watch": None, "_freeze_from": _NEVER, "_seen": seen, "_frozen": dict(self._frozen)}
        return {**super().__getstate__(), **own, **alone}
