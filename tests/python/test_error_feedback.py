"""EF14, EF21 and EControl against the equations of docs/error_control.md in double precision, and what Python says of them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import thinwire
from thinwire.__main__ import main

STEPS, SHAPE = 7, (60, 30)
K = 180  # 10 %
TOPK = "codec=topk:density=0.1,select=exact"
REST = "min_numel=10 exchange=gather"


def top(x: torch.Tensor) -> torch.Tensor:
    keep = torch.argsort(-x.abs(), stable=True)[:K]
    out = torch.zeros_like(x)
    out[keep] = x[keep]
    return out


def equations(grads: torch.Tensor, *, control: bool, eta: float, average: float, dense: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What comes back at each step, and the state of all ranks. `grads`: (steps, world, n)."""
    world, n = grads.shape[1:]
    e, h, v = (torch.zeros(world, n, dtype=torch.float64) for _ in range(3))
    mean, out = torch.zeros(n, dtype=torch.float64), []
    for step, g in enumerate(grads.double()):
        if step == 0 and dense:
            h, v, mean = g.clone(), g.clone(), g.mean(0)
        else:
            v = g.clone() if step == 0 else (1 - average) * v + average * g  # the first of a run is its average
            sent = torch.zeros_like(h)
            for rank in range(world):
                news = v[rank] - h[rank]
                sent[rank] = top((eta * e[rank] if control else 0) + news)
                e[rank] += news - sent[rank]
            h = h + sent
            mean = mean + sent.mean(0)
        out.append(mean)
    return torch.stack(out), {"residual": e, "estimate": h, "average": v, "mean_estimate": mean}


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("feedback", "how"),
    [
        ("ef21", {"control": False, "eta": 0.0, "average": 1.0, "dense": True}),
        ("ef21:worker_ema=0.25,init=zero", {"control": False, "eta": 0.0, "average": 0.25, "dense": False}),
        ("econtrol", {"control": True, "eta": 0.1, "average": 1.0, "dense": True}),
        ("econtrol:eta=0.05,init=zero", {"control": True, "eta": 0.05, "average": 1.0, "dense": False}),
        ("econtrol:worker_ema=0.5", {"control": True, "eta": 0.1, "average": 0.5, "dense": True}),
    ],
)
def test_replay_follows_the_equations(feedback: str, how: dict, world: int) -> None:
    grads = torch.randn(STEPS, world, *SHAPE, generator=torch.Generator().manual_seed(world))
    run = thinwire.replay(f"{TOPK} feedback={feedback} {REST}", {"w": grads})
    means, state = equations(grads.flatten(2), **how)
    # A few roundings of numbers below 8 a step, and as many in what they are sums of.
    bound = 8 * STEPS * 2**-23
    assert (run.mean["w"].flatten(1) - means).abs().max() < bound
    names = {"estimate", "mean_estimate"} | ({"residual"} if how["control"] else set()) | ({"average"} if how["average"] < 1 else set())
    for rank in range(world):
        assert set(run.state[rank]["w"]) == names
        for name in names:
            want = state[name] if name == "mean_estimate" else state[name][rank]
            assert (run.state[rank]["w"][name].flatten() - want).abs().max() < bound, name
            assert want.abs().max() > 100 * bound


def stored(x: torch.Tensor, narrow: bool) -> torch.Tensor:
    return x.bfloat16().float() if narrow else x


@pytest.mark.parametrize("world", [1, 3, 4])
@pytest.mark.parametrize(("residual", "estimate"), [("bf16", "fp32"), ("fp32", "grid"), ("bf16", "grid")])
def test_state_in_two_bytes_is_what_torch_rounds_to_the_bit(residual: str, estimate: str, world: int) -> None:
    grads = torch.randn(STEPS, world, *SHAPE, generator=torch.Generator().manual_seed(world))
    config = thinwire.econtrol(codec="topk:density=0.1,select=exact", residual=residual, estimate=estimate, exchange="gather", min_numel=10)
    run = thinwire.replay(config, {"w": grads})
    narrow, grid, eta = residual == "bf16", estimate == "grid", torch.tensor(0.1)
    messages = stored(grads[0].flatten(1), True)  # the dense start
    h, e = messages.clone(), torch.zeros(world, K * 10)
    if grid:
        e = stored(grads[0].flatten(1) - h, narrow) * (0 if narrow else 1)
    mean = torch.stack(list(messages)).cumsum(0)[-1] * torch.tensor(1 / world)
    assert torch.equal(run.mean["w"][0].flatten(), mean)
    for step in range(1, STEPS):
        total = torch.zeros(K * 10)
        for rank, g in enumerate(grads[step].flatten(1)):
            news = g - h[rank]
            x = top(eta * e[rank] + news)
            sent = torch.where(x != 0, stored(h[rank] + x, True) - h[rank], x) if grid else x
            e[rank] = stored(e[rank] + news, narrow)
            e[rank] = torch.where(x != 0, stored(e[rank] - sent, narrow), e[rank])
            h[rank] = stored(h[rank] + sent, grid)
            total = total + sent
        mean = mean + total * torch.tensor(1 / world)
        assert torch.equal(run.mean["w"][step].flatten(), mean), step
    for rank in range(world):
        state = run.state[rank]["w"]
        assert torch.equal(state["residual"].flatten(), e[rank]) and torch.equal(state["estimate"].flatten(), h[rank])
        assert (h.mean(0) - state["mean_estimate"].flatten()).abs().max() < STEPS * 2**-20


@pytest.mark.parametrize("world", [2, 3])
def test_owners_hold_what_the_mean_estimate_lacks(world: int) -> None:
    grads = torch.randn(STEPS, world, *SHAPE, generator=torch.Generator().manual_seed(3))
    run = thinwire.replay("codec=sign feedback=econtrol min_numel=10", {"w": grads})
    owed = torch.cat([run.state[rank]["w"]["server_residual"] for rank in range(world)]).double()
    estimates = torch.stack([run.state[rank]["w"]["estimate"].flatten().double() for rank in range(world)]).mean(0)
    held = run.state[0]["w"]["mean_estimate"].flatten().double()
    assert owed.abs().max() > 1e-3
    assert (held + owed - estimates).abs().max() < 8 * STEPS * 2**-23


def test_the_watchdog_lowers_an_eta_that_is_too_large() -> None:
    generator = torch.Generator().manual_seed(1)
    grads = torch.randn(1, 1, *SHAPE, generator=generator).repeat(300, 1, 1, 1) + 0.1 * torch.randn(300, 1, *SHAPE, generator=generator)
    wild, tame = (thinwire.replay(f"{TOPK} feedback=econtrol:eta={eta} {REST}", {"w": grads}).stats["parameters"]["w"] for eta in (0.6, "auto"))
    assert wild["eta_cuts"] > 0 and wild["eta"] < 0.6
    assert tame["eta_cuts"] == 0 and tame["eta"] == pytest.approx(0.1)
    assert 0.1 < tame["measured_delta"] < 1 and 0 < tame["stale"] < 1
    assert tame["estimate_norm"] == pytest.approx(tame["grad_norm"], rel=0.3)


@pytest.mark.parametrize(("world", "exchange"), [(1, "gather"), (2, "gather"), (2, "two_phase")])
def test_measured_delta_is_what_the_codec_did(world: int, exchange: str) -> None:
    # 10 of 100 columns carry all: the l2 scale of a row is sqrt(.1)·s, and the error 2·(1 − sqrt(.1)) of the energy; l1 scales lose 1 − .1.
    row = torch.zeros(100)
    row[::10] = 1
    grads = row.repeat(1, world, 80, 1).contiguous()
    for feedback in ("ef14", "none"):
        for scale, delta in (("l1", 0.1), ("l2", 1 - 2 * (1 - 0.1**0.5))):
            run = thinwire.replay(f"codec=sign:scale={scale},block=tensor feedback={feedback} exchange={exchange} min_numel=10", {"w": grads})
            assert run.stats["parameters"]["w"]["measured_delta"] == pytest.approx(delta, abs=1e-6), feedback
        # Of n magnitudes 1, 2, … n the largest tenth has this share of the energy.
        ramp = torch.arange(1.0, 8001.0).reshape(80, 100).repeat(1, world, 1, 1)
        run = thinwire.replay(f"codec=topk:density=0.1,select=exact feedback={feedback} {REST}", {"w": ramp})
        energy = torch.arange(1.0, 8001.0, dtype=torch.float64).square()
        assert run.stats["parameters"]["w"]["measured_delta"] == pytest.approx(float(energy[-800:].sum() / energy.sum()), abs=1e-6), feedback


def test_presets_are_slots() -> None:
    assert thinwire.econtrol() == thinwire.Config.parse("econtrol")
    assert thinwire.econtrol(codec="sign", eta=0.3, worker_ema=0.1, init="zero", min_numel=5) == thinwire.Config.parse("codec=sign feedback=econtrol:eta=0.3,worker_ema=0.1,init=zero min_numel=5")
    assert thinwire.error_feedback("ef21", codec="topk:density=0.1", worker_ema=0.1) == thinwire.Config.parse("codec=topk:density=0.1 feedback=ef21:worker_ema=0.1")
    for text, word in (("econtrol:eta=-1", "outside"), ("econtrol:eta=x", "a number"), ("codec=sign:scale=l2 feedback=econtrol", "contraction")):
        with pytest.raises(thinwire.ConfigError, match=word):
            thinwire.Config.parse(text)
    with pytest.raises(thinwire.ConfigError, match="error_feedback"):
        thinwire.econtrol(feedback="ef14")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("codec=topk:density=0.1 feedback=none", ["diverge", "ef14"]),
        ("codec=sign feedback=none", ["diverge", "ef14"]),
        ("codec=sign feedback=none target=momentum:freeze=5", ["diverge", "ef14"]),
        ("codec=topk:density=1 feedback=none", ["sends every tensor densely"]),
        ("codec=topk:density=1 feedback=none exchange=gather", []),
        ("econtrol:eta=0.3", ["eta=0.3", "0.2", "eta=auto is 0.1"]),
        ("econtrol:density=0.01", ["stale", "worker_ema=0.1"]),
        ("econtrol:density=0.03", ["density 0.03", "stale", "worker_ema=0.1"]),
        ("econtrol:density=0.05", []),
        ("codec=sign feedback=econtrol:eta=1.5", ["eta=1.5", "codec=sign"]),
        ("codec=sign:scale=l2 feedback=econtrol:eta=0.1", ["no contraction", "scale=l1"]),
        ("codec=sign:scale=l2 feedback=ef21", ["no contraction", "scale=l1"]),
        ("codec=sign:scale=l2 feedback=ef14", ["no contraction", "residuals may diverge"]),
        ("onebit_adam:scale=l2", []),
        ("econtrol", []),
        ("econtrol:density=0.01,worker_ema=0.1", []),
        ("onebit_adam", []),
    ],
)
def test_check_warns_of_what_is_likely_to_go_wrong(config: str, words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    assert main(["check", config, "--json", str(file)]) == 0
    said = capsys.readouterr().out
    assert ("warning:" in said) == bool(words)
    warned = json.loads(file.read_text())["rows"][0]["warnings"]
    assert len(warned) == (1 if words else 0)
    assert all(word in warned[0] for word in words)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("codec=none", None),
        ("codec=topk:density=0.01 feedback=none", None),
        ("onebit_adam", None),
        ("codec=topk:density=0.01 feedback=ef14", ["small noisy minibatches", "econtrol:worker_ema=0.1"]),
        ("dgc:density=0.001", ["feedback=dgc at density 0.001"]),
        ("codec=topk:density=0.1 feedback=ef14", ["feedback=econtrol converges"]),
        ("econtrol", ["large batches", "worker_ema=0.1"]),
        ("econtrol:density=0.01", None),
        ("econtrol:density=0.01,worker_ema=0.1", ["different data", "feedback=ef14"]),
        ("codec=topk:density=0.1 feedback=ef21", ["choose feedback=econtrol"]),
        ("codec=topk:density=0.1 feedback=ef21:worker_ema=0.1", ["convex and federated"]),
        ("econtrol:density=0.03,worker_ema=0.1", ["convex and federated", "feedback=ef14"]),
        ("codec=topk:density=0.03 feedback=ef14", ["small noisy minibatches", "econtrol:worker_ema=0.1"]),
        ("econtrol:density=0.05", ["convex and federated"]),
        ("codec=topk:density=0.016 feedback=ef14:decay=0.95", ["local steps", "decay=1"]),
        ("codec=sign feedback=ef14:decay=0.95", ["local steps"]),
        ("codec=sign feedback=ef14", ["onebit_adam"]),
        ("codec=sign feedback=ef21", ["onebit_adam"]),
        ("econtrol:worker_ema=0.1", ["large batches, ranks with different data"]),
    ],
)
def test_check_says_what_a_config_suits(config: str, words: list[str] | None, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    assert main(["check", config, "--json", str(file)]) == 0
    hints = json.loads(file.read_text())["rows"][0]["hints"]
    assert ("hint:" in capsys.readouterr().out) == bool(words) and len(hints) == (1 if words else 0)
    assert all(word in hints[0] for word in words or ())
    assert ("worker_ema=0.1" in config) <= ("add worker_ema" not in "".join(hints)), "it is there"


def test_check_says_when_econtrol_on_signs_is_better(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    for config, noise in (("codec=sign feedback=econtrol", True), ("codec=sign feedback=econtrol:worker_ema=0.1", False)):
        assert main(["check", config, "--json", str(file)]) == 0
        assert capsys.readouterr().out.count("hint: ") == 2
        adam, better = json.loads(file.read_text())["rows"][0]["hints"]
        assert "onebit_adam" in adam and "better than feedback=ef14 with large batches, with different data" in better
        assert ("add worker_ema=0.1" in better) == noise


def test_check_shows_all_of_a_long_slot(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["check", "econtrol:eta=theory,worker_ema=0.125,residual=bf16,estimate=grid"]) == 0
    said = "".join(line.strip("│┃ ").split("│")[-1].strip() for line in capsys.readouterr().out.splitlines())
    assert "econtrol:eta=theory,worker_ema=0.125,init=dense,residual=bf16,estimate=grid" in said


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_hook_warns_once(alone: None) -> None:
    with pytest.warns(UserWarning, match="eta=0.9 is above twice"):
        state = thinwire.HookState("econtrol:eta=0.9", named_parameters=[("w", torch.nn.Parameter(torch.zeros(4, 4)))])
    state.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        thinwire.HookState("econtrol", named_parameters=[("w", torch.nn.Parameter(torch.zeros(4, 4)))]).close()


def test_the_hook_says_once_that_the_watchdog_has_lowered_eta(alone: None) -> None:
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(40, 50, bias=False))
    with pytest.warns(UserWarning, match="eta=0.9 is above twice"):
        state = thinwire.attach(model, f"{TOPK} feedback=econtrol:eta=0.9 {REST}")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(120):
            model.zero_grad()
            model(torch.randn(8, 40)).sum().backward()
    assert state.stats()["parameters"]["weight"]["eta"] < 0.9
    state.close()
    assert len(said) == 1 and "rank 0" in str(said[0].message), [str(one.message) for one in said]
    assert "lowered eta of 'weight' to 0.45" in str(said[0].message) and "econtrol:eta=0.9" in str(said[0].message)


def test_a_cut_in_the_last_step_is_told_by_stats_and_by_close(alone: None) -> None:
    def train(steps: int, look: bool) -> tuple[int, int, list[str]]:
        torch.manual_seed(0)
        model = DistributedDataParallel(torch.nn.Linear(40, 50, bias=False))
        state = thinwire.attach(model, f"{TOPK} feedback=econtrol:eta=0.9 {REST}")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for step in range(steps):
                model.zero_grad()
                model(torch.randn(8, 40)).sum().backward()
                if look and state.stats()["parameters"]["weight"].get("eta_cuts", 0) > 0:
                    break
            before = len(said)
            state.close()
            state.close()
        return step + 1, before, [str(one.message) for one in said]

    with pytest.warns(UserWarning, match="eta=0.9 is above twice"):
        steps, before, told = train(200, True)
        assert steps < 200 and before == 1 and len(told) == 1 and "lowered eta of 'weight'" in told[0], told
        assert train(steps, False) == (steps, 0, told)  # no bucket comes after the last step
        assert train(steps - 1, False) == (steps - 1, 0, [])


@pytest.mark.parametrize("by_attach", [True, False])
def test_a_residual_keeps_its_worth_when_the_learning_rate_changes(alone: None, by_attach: bool) -> None:
    def train(rescale: int) -> tuple[dict, torch.Tensor]:
        torch.manual_seed(0)
        model = DistributedDataParallel(torch.nn.Linear(40, 50, bias=False))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        config = f"codec=topk:density=0.1 feedback=ef14:lr_rescale={rescale} {REST}"
        if by_attach:
            state = thinwire.attach(model, config, optimizer)
        else:
            state = thinwire.HookState(config, named_parameters=model.module.named_parameters(), optimizer=optimizer)
            model.register_comm_hook(state, thinwire.hook)
        x = torch.randn(8, 40, generator=torch.Generator().manual_seed(1))
        before = None
        for step in range(3):
            if step == 2:
                before = state.state_dict()["parameters"]["weight"]["residual"].clone()
                optimizer.param_groups[0]["lr"] = 0.125
            model(x).square().mean().backward()
            if step < 2:
                optimizer.step()
                optimizer.zero_grad()
        saved = state.state_dict()
        grad = model.module.weight.grad
        state.close()
        return saved, before, grad, x, model

    plain, rescaled = train(0), train(1)
    assert torch.equal(plain[1], rescaled[1])
    assert "lr" not in plain[0] and rescaled[0]["lr"] == {"weight": 0.125}
    # With one rank what is sent and what stays make up the message, e + g: the messages differ by 3·e.
    differences = [saved["parameters"]["weight"]["residual"] + grad for saved, _, grad, _, _ in (plain, rescaled)]
    torch.testing.assert_close(differences[1] - differences[0], 3 * plain[1], rtol=1e-4, atol=1e-6)


def test_following_a_learning_rate_needs_one(alone: None) -> None:
    model = DistributedDataParallel(torch.nn.Linear(4, 4))
    with pytest.raises(thinwire.ConfigError, match="lr_rescale=1 follows the optimizer"):
        thinwire.attach(model, "codec=topk:density=0.1 feedback=ef14:lr_rescale=1")
    with pytest.raises(thinwire.ConfigError, match="lr_rescale=1 follows the optimizer"):
        thinwire.HookState("codec=topk:density=0.1 feedback=ef14:lr_rescale=1", named_parameters=model.module.named_parameters())
    with pytest.raises(thinwire.ConfigError, match="a recording has none"):
        thinwire.replay("codec=topk:density=0.1 feedback=ef14:lr_rescale=1", {"w": torch.zeros(1, 1, 4)})
    state = thinwire.attach(model, "codec=topk:density=0.1 feedback=ef14")
    for bad in (0.0, -1.0, float("inf"), "x"):
        with pytest.raises(thinwire.Error, match="not a positive number"):
            state.on_lr_change(bad)
    with pytest.raises(thinwire.Error, match="is not a parameter here"):
        state.on_lr_change({"nothing": 0.5})
    state.close()
