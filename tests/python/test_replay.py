"""replay: the whole engine on ranks as threads, against the published equations, hand-computed vectors and an independent decoder."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Oracle
from wire import Segment, decode, decode_signs

import thinwire
from thinwire import replay

EXACT = "select=exact"
# Computed by hand from the equations: n = 8, k = 2, N = 2, m = 0.5; g[step][rank]. Dyadic, so fp32 computes it exactly.
GRADS = torch.tensor(
    [
        [[1, -2, 3, -4, 0.5, 0.25, -0.125, 8], [-1, 2, -3, 4, 5, -0.25, 0.125, 0]],
        [[0.5, 1, -1, 2, -6, 0, 0.25, -0.5], [2, -2, 1, -1, 0.5, 7, 0, 1]],
        [[-1, 0.5, 2, 1, 1, -1, 4, 0.25], [0, 3, -0.5, 0.25, -2, 1, -1, -8]],
    ]
)


def vector(feedback: str) -> thinwire.Replay:
    config = f"codec=topk:density=0.25,{EXACT} feedback=dgc:momentum=0.5,{feedback} exchange=gather min_numel=0"
    return replay(config, {"w": GRADS.reshape(3, 2, 2, 4)}, record_payloads=True)


def sent(result: thinwire.Replay, step: int, rank: int) -> set[int]:
    (dense,) = decode(result.payloads[step][rank], [Segment(8, 0.25, "fp32", "auto", True)], step)
    return set(np.flatnonzero(dense).tolist())


def expect(tensor: torch.Tensor, values: list[float]) -> None:
    assert tensor.reshape(-1).tolist() == values


def test_vector_plain() -> None:
    result = vector("mask=1")
    expect(result.mean["w"][0], [0, 0, 0, 0, 2.5, 0, 0, 4])
    expect(result.mean["w"][1], [0, 0, 0, 0, -2.625, 3.3125, 0, 0])
    expect(result.mean["w"][2], [0, 1.75, 0, 2, 0, 0, 2.078125, -3.25])
    assert [[sent(result, t, r) for r in range(2)] for t in range(3)] == [[{3, 7}, {3, 4}], [{2, 4}, {2, 5}], [{3, 6}, {1, 7}]]
    expect(result.state[0]["w"]["momentum"], [-0.5, 0.5, 2, 0, 1, -0.9375, 0, 0])
    expect(result.state[0]["w"]["accumulated"], [1.5, -1.5, 2, 0, 1, -0.5625, 0, -0.5])
    expect(result.state[1]["w"]["momentum"], [0.75, 0, -0.5, -0.25, -1.75, 1, -0.96875, 0])
    expect(result.state[1]["w"]["accumulated"], [1.25, 0, -0.5, -1.25, -1.25, 1, -0.78125, 0])


def test_vector_without_mask() -> None:
    result = vector("mask=0")
    expect(result.mean["w"][2], [0, 0, 0, 0, 0, 2.21875, 2.078125, -0.5])
    assert [[sent(result, t, r) for r in range(2)] for t in range(3)] == [[{3, 7}, {3, 4}], [{2, 4}, {2, 5}], [{6, 7}, {5, 7}]]
    expect(result.state[0]["w"]["accumulated"], [1.5, -1.5, 2.25, 1, -1.875, -0.5625, 0, 0])
    expect(result.state[1]["w"]["accumulated"], [1.25, 3.5, -0.75, 1.75, 2.5, 0, -0.78125, 0])
    expect(result.state[1]["w"]["momentum"], [0.75, 2.5, -0.75, 0.75, -0.5, 4.4375, -0.96875, -7.5])


def test_vector_nesterov() -> None:
    result = vector("nesterov=1,mask=1")
    expect(result.mean["w"][0], [0, 0, 0, 0, 3.75, 0, 0, 6])
    expect(result.mean["w"][1], [0, 0, 0, 0, -4.0625, 5.03125, 0, 0])
    expect(result.mean["w"][2], [0, 2.375, 0, 2.5, 0, 0, 3.1015625, -5.125])
    expect(result.state[0]["w"]["accumulated"], [1.25, -1.25, 3, 0, 1.5, -1.03125, 0, -0.5])
    expect(result.state[0]["w"]["momentum"], [-0.25, 0.25, 1, 0, 0.5, -0.46875, 0, 0])


def descend(gradients: torch.Tensor, optimizer: type[torch.optim.Optimizer], **options: object) -> torch.Tensor:
    w = torch.nn.Parameter(torch.ones(gradients.shape[1:]))
    made = optimizer([w], lr=0.01, **options)
    for g in gradients:
        w.grad = g.clone()
        made.step()
    return w.detach()


@pytest.mark.parametrize("nesterov", [0, 1])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_everything_sent_is_momentum_sgd(world: int, nesterov: int) -> None:
    """Invariant 1: density 1, mask off: dense momentum SGD; one rank without Nesterov to the bit."""
    torch.manual_seed(world)
    steps, grads = 200, torch.randn(200, world, 6, 5)
    out = replay(
        f"codec=topk:density=1,{EXACT} feedback=dgc:momentum=0.9,mask=0,nesterov={nesterov} exchange=gather min_numel=0", {"w": grads}
    )
    ours = descend(out.mean["w"], torch.optim.SGD)
    theirs = descend(grads.mean(dim=1), torch.optim.SGD, momentum=0.9, nesterov=bool(nesterov))
    if world == 1 and not nesterov:
        assert torch.equal(ours, theirs)
    # About (world + 4) roundings of 2^-24 a step on sums of |u| ≲ 10; the weights' own rounding is the same size. lr = 0.01.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01 * steps * (world + 4) * 2.0**-24 * 10 * 10)
    assert (ours - 1).abs().max() > 0.1


@pytest.mark.parametrize("nesterov", [0, 1])
def test_everything_sent_and_masked_is_plain_sgd(nesterov: int) -> None:
    """Invariant 2: with masking everything sent restarts the momentum: the mean gradient, times 1 + m with Nesterov."""
    grads = torch.randint(-64, 65, (20, 4, 6, 5)) / 8.0  # dyadic: exact
    out = replay(
        f"codec=topk:density=1,{EXACT} feedback=dgc:momentum=0.5,mask=1,nesterov={nesterov} exchange=gather min_numel=0", {"w": grads}
    )
    # Zeros are never sent: their momentum is not masked, but it is zero as well.
    assert torch.equal(out.mean["w"], grads.mean(dim=1) * (1.5 if nesterov else 1))


def test_clipping_is_the_papers() -> None:
    """Invariant 9: on N equal local gradients the rule of sqrt(N)·c before the sum is the paper's c/sqrt(N) on gradients that carry 1/N."""
    world, c = 4, 0.7
    torch.manual_seed(3)
    a, b = torch.randn(5, 1, 8, 8).repeat(1, world, 1, 1), torch.randn(5, 1, 4, 8).repeat(1, world, 1, 1) * 0.01
    config = f"codec=topk:density=1,{EXACT} feedback=dgc:momentum=0,mask=0,clip_norm={c} exchange=gather min_numel=0"
    out = replay(config, {"a": a, "b": b})
    total = a[0, 0].numel() + b[0, 0].numel()
    for name, grads in (("a", a), ("b", b)):
        share = math.sqrt(grads[0, 0].numel() / total)
        for step in range(5):
            g = grads[step, 0].double() / world
            paper = sum(g * min(1.0, c * share / math.sqrt(world) / (g.norm() + 1e-30)) for _ in range(world))
            # The norm of 64 squares, a root, a quotient and three products in fp32: below 100 roundings.
            torch.testing.assert_close(out.mean[name][step].double(), paper, rtol=100 * 2.0**-24, atol=0)
    assert torch.equal(out.mean["b"], b[:, 0]) or (b.flatten(2).norm(dim=2) > c).any(), "small gradients are not touched"


@pytest.mark.parametrize("nesterov", [False, True])
def test_weight_decay_beside_the_hook(nesterov: bool) -> None:
    """Invariant 10: DGCSGD behind a hook that sends everything is torch's SGD with momentum and weight decay."""
    torch.manual_seed(5)
    world, grads = 3, torch.randn(100, 3, 6, 5)
    out = replay(
        f"codec=topk:density=1,{EXACT} feedback=dgc:momentum=0.9,mask=0,nesterov={int(nesterov)} exchange=gather min_numel=0", {"w": grads}
    )
    ours = descend(out.mean["w"], thinwire.optim.DGCSGD, momentum=0.9, weight_decay=0.1, nesterov=nesterov)
    theirs = descend(grads.mean(dim=1), torch.optim.SGD, momentum=0.9, weight_decay=0.1, nesterov=nesterov)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01 * 100 * (world + 6) * 2.0**-24 * 10 * 10)
    wrong = descend(out.mean["w"], torch.optim.SGD, weight_decay=0.1)
    assert (wrong - theirs).abs().max() > 1e-3, "the tolerance would take plain weight decay"


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["dgc", "ef14"]),
    world=st.sampled_from([1, 2, 3, 4, 7]),
    density=st.sampled_from([0.01, 0.1, 0.5, 1.0]),
    nesterov=st.booleans(),
    mask=st.booleans(),
    shapes=st.lists(st.sampled_from([(3,), (1, 1), (4, 5), (2, 3, 7), (1, 64), (33, 3)]), min_size=1, max_size=4),
    min_numel=st.sampled_from([0, 20]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_equals_the_textbook(kind, world, density, nesterov, mask, shapes, min_numel, dtype, seed) -> None:  # noqa: ANN001
    """Every result and every state, to the bit, on worlds 1 to 7; integers make ties."""
    torch.manual_seed(seed)
    steps = 4
    grads = {
        f"p{i}": (torch.randn(steps, world, *shape) if seed % 2 else torch.randint(-3, 4, (steps, world, *shape))).to(dtype)
        for i, shape in enumerate(shapes)
    }
    oracle = Oracle(world, kind=kind, density=density, nesterov=nesterov and kind == "dgc", mask=mask, min_numel=min_numel)
    out = replay(oracle.config, grads)
    for step in range(steps):
        expected = oracle.step([{name: g[step, rank] for name, g in grads.items()} for rank in range(world)])
        for name, value in expected.items():
            assert torch.equal(out.mean[name][step], value), (step, name)
    for rank in range(world):
        for name, arrays in out.state[rank].items():
            if "momentum" in arrays:
                assert torch.equal(arrays["momentum"].reshape(-1), oracle.ranks[rank].u[name])
            for residual in ("accumulated", "residual"):
                if residual in arrays:
                    assert torch.equal(arrays[residual].reshape(-1), oracle.ranks[rank].v[name])


@settings(max_examples=60, deadline=None)
@given(
    world=st.sampled_from([1, 2, 3]),
    density=st.sampled_from([0.001, 0.02, 0.3, 1.0]),
    wire=st.sampled_from(["fp32", "bf16", "fp16"]),
    index=st.sampled_from(["auto", "u32", "u16", "bitmap"]),
    select=st.sampled_from(["sampled", "exact"]),
    shapes=st.lists(st.sampled_from([(1, 1), (5, 31), (7, 9), (64, 64), (3, 30000)]), min_size=1, max_size=3),
    scale=st.sampled_from([1e-6, 1.0, 1e5]),
    seed=st.integers(0, 2**31),
)
def test_payloads_say_what_was_received(world, density, wire, index, select, shapes, scale, seed) -> None:  # noqa: ANN001
    """An independent decoder of the recorded bytes gives the mean, and what it decodes plus the residual is what was fed in (EF14, one
    step)."""
    torch.manual_seed(seed)
    grads = {f"p{i}": torch.randn(1, world, *shape) * scale for i, shape in enumerate(shapes)}
    config = f"codec=topk:density={density},wire={wire},index={index},select={select} feedback=ef14 exchange=gather min_numel=0"
    out = replay(config, grads, record_payloads=True)
    segments = [Segment(math.prod(shape), density, wire, index, select == "exact") for shape in shapes]
    decoded = [decode(out.payloads[0][rank], segments, 0) for rank in range(world)]
    for i, (name, g) in enumerate(grads.items()):
        total = torch.zeros(segments[i].numel)
        for rank in range(world):
            part = torch.from_numpy(decoded[rank][i])
            total = total + part
            # g − round(g): exact in fp32 (Sterbenz) wherever the wire's value is within a factor of two of g; it is 0 or g's own rounding.
            assert torch.equal(part + out.state[rank][name]["residual"].reshape(-1), g[0, rank].reshape(-1)), "lost on the way"
        assert torch.equal(out.mean[name][0].reshape(-1), total * torch.tensor(1 / world, dtype=torch.float32))


@pytest.mark.parametrize(("config", "freeze"), [("codec=sign:block=64 feedback=ef14", 0), ("codec=sign:block=tensor feedback=ef14", 0), ("onebit_adam:freeze=1,block=64", 1)])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_two_phase_payloads_say_what_was_sent_and_received(config: str, freeze: int, world: int) -> None:
    """Recorded are phase 1 in destination order, then phase 2. The second phase is the mean that all received; the first, averaged, and what its
    owner had held back make the second and what it holds back now; a rank's own parts and its residual make its message."""
    shapes, block, steps = {"a": (33, 31), "b": (2, 5), "c": (40, 100)}, 0 if "tensor" in config else 64, freeze + 3
    torch.manual_seed(8)
    grads = {name: torch.randn(steps, world, *shape) for name, shape in shapes.items()}
    out = replay(f"{config} min_numel=1", grads, record_payloads=True)
    numel = [math.prod(shape) for shape in shapes.values()]
    cuts = [[min(n, r * 8 * -(-n // (8 * world))) for r in range(world + 1)] for n in numel]
    assert all(not out.payloads[step][rank] for step in range(freeze) for rank in range(world)), "dense sums are no payloads"
    held = [np.zeros(n) for n in numel]  # by the owners
    residual = [[np.zeros(n) for n in numel] for _ in range(world)]
    m = [0.1 * g[0].mean(dim=0).reshape(-1).double().numpy() if freeze else np.zeros(n) for g, n in zip(grads.values(), numel)]
    for step in range(freeze, steps):
        sent = [[np.zeros(n) for n in numel] for _ in range(world)]
        means = [np.zeros(n) for n in numel]
        for rank in range(world):
            payload = out.payloads[step][rank]
            size = len(payload) // (world + 1)  # as many first payloads as ranks, and one second; all as long as the longest
            for part in range(world + 1):
                owner = part if part < world else rank
                counts = [cut[owner + 1] - cut[owner] for cut in cuts]
                values = decode_signs(payload[part * size : (part + 1) * size], counts, block, step)
                for i, cut in enumerate(cuts):
                    (sent[rank] if part < world else means)[i][cut[owner] : cut[owner + 1]] = values[i]
        for i, (name, g) in enumerate(grads.items()):
            assert np.array_equal(out.mean[name][step].reshape(-1).numpy(), means[i].astype(np.float32)), name
            for rank in range(world):
                news = g[step, rank].reshape(-1).double().numpy()
                residual[rank][i] += (0.9 * m[i] + 0.1 * news if freeze else news) - sent[rank][i]
            held[i] += sum(one[i] for one in sent) / world - means[i]
            m[i] = means[i]
    for i, name in enumerate(grads):  # fp32 beside fp64: three steps of messages below 10, a few roundings each
        for rank in range(world):
            state = out.state[rank][name]
            assert np.allclose(state["residual"].reshape(-1).numpy(), residual[rank][i], rtol=0, atol=1e-5), name
            assert np.allclose(state["server_residual"].numpy(), held[i][cuts[i][rank] : cuts[i][rank + 1]], rtol=0, atol=1e-5), name


def test_a_step_that_is_not_finite() -> None:
    """Invariant 13 as the design has it: NaN everywhere, no state poisoned, nothing lost: deliveries and residuals add up to the news, to
    the bit."""
    world, steps, m = 3, 8, 0.5
    torch.manual_seed(9)
    grads = torch.randint(-32, 33, (steps, world, 6, 7)) / 4.0
    news = grads.clone()
    bad = {2: (1, 5, torch.nan), 5: (0, 0, torch.inf), 6: (2, 41, -torch.inf)}
    for step, (rank, at, value) in bad.items():
        grads[step, rank].view(-1)[at] = value
        news[step, rank].view(-1)[at] = 0
    for kind in ("dgc:momentum=0.5,mask=0", "dgc:momentum=0.5,mask=0,nesterov=1", "ef14"):
        out = replay(f"codec=topk:density=0.1,{EXACT} feedback={kind} exchange=gather min_numel=0", {"w": grads})
        assert out.stats["nonfinite_steps"] == len(bad)
        for step in range(steps):
            assert torch.isnan(out.mean["w"][step]).all() if step in bad else torch.isfinite(out.mean["w"][step]).all()
        fed = torch.zeros(6, 7, dtype=torch.float64)
        for rank in range(world):
            u = torch.zeros(6, 7, dtype=torch.float64)
            for g in news[:, rank].double():
                u = g if kind == "ef14" else m * (u + g) if "nesterov" in kind else m * u + g
                fed += u + g if "nesterov" in kind else u
            if kind != "ef14":
                assert torch.equal(out.state[rank]["w"]["momentum"].double(), u)
        held = sum(out.state[rank]["w"]["residual" if kind == "ef14" else "accumulated"].double() for rank in range(world))
        got = torch.nansum(out.mean["w"].double(), dim=0) * world
        # Sums of sent values are exact in fp32 here; only the product with float(1/3) rounds: half an ulp of each mean, and 1/3's own
        # error.
        torch.testing.assert_close(got + held, fed, rtol=0, atol=float(steps * 2.0**-22 * out.mean["w"].nan_to_num().abs().max() * world))
        out = replay(f"codec=topk:density=0.1,{EXACT} feedback={kind} exchange=gather min_numel=0", {"w": grads[:, :2]})
        assert out.stats["nonfinite_steps"] == 2


def test_several_steps_cost_what_check_says() -> None:
    numel, world = 128 * 128, 4
    config = thinwire.Config.parse("dgc:density=0.01,warmup_steps=2 start_step=1")
    out = replay(config, {"w": torch.randn(12, world, 128, 128)})
    stages = thinwire._extension.native.estimate(config, numel, world)
    for step in range(12):
        stage = [s for s in stages if s["first_step"] <= step][-1]
        assert out.payload_bytes[step].tolist() == pytest.approx([stage["payload_bytes"]] * world, abs=512), (step, stage)
    assert [s["stage"].split(",")[0] for s in stages] == ["dense start", "warm-up", "warm-up", "warm-up", "compressed"]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("config", ["onebit_adam:freeze=1 min_numel=100", "onebit_adam:freeze=1 min_numel=100 exchange=gather", "dgc min_numel=100 exchange=gather"])
def test_dense_and_compressed_tensors_cost_what_check_says(config: str, world: int) -> None:
    def sent(**shapes: tuple[int, ...]) -> int:
        out = replay(config, {name: torch.randn(2, world, *shape) for name, shape in shapes.items()})
        assert len(set(out.payload_bytes[-1].tolist())) == 1
        return int(out.payload_bytes[-1][0])

    parsed = thinwire.Config.parse(config)
    for numel in (99, 50 * 37, 301 * 200):
        (stage,) = [s for s in thinwire._extension.native.estimate(parsed, numel, world) if s["stage"].startswith("compressed") or "beside" in s["stage"]]
        if stage["compressed"]:
            assert sent(w=(1, numel)) == stage["payload_bytes"]
            continue
        got = sent(w=(10, 400), b=(1, numel)) - sent(w=(10, 400))
        assert got == pytest.approx(stage["payload_bytes"], abs=128), numel  # a share is padded to whole words


def test_empty_and_odd_gradients() -> None:
    for shape in ((0, 4), (1, 1), (0,), ()):
        out = replay("dgc:density=0.5 min_numel=0", {"w": torch.ones(2, 2, *shape)})
        assert out.mean["w"].shape == (2, *shape)
    assert replay("codec=none", {"w": torch.ones(0, 2, 3)}).mean["w"].shape == (0, 3)


@pytest.mark.parametrize(
    ("grads", "word"),
    [
        ({}, "no gradients"),
        ({"w": torch.ones(3)}, "steps, world"),
        ({"w": torch.ones(3, 0, 2)}, "steps, world"),
        ({"w": torch.ones(3, 2, 2, dtype=torch.float64)}, "gradients of w are Double"),
        (3, "not be a int"),
        ({"w": torch.ones(3, 2, 2), "b": torch.ones(3, 2, 2, dtype=torch.bfloat16)}, "dtype"),
        ({"w": torch.ones(3, 2, 2), "b": torch.ones(3, 3, 2)}, "3 ranks"),
        ({"w": [1, 2]}, "w is a list; torch tensors"),
        ({"w": torch.ones(1, 1025, 0)}, "1025 ranks"),
        ({"w": torch.ones(1, 2**40, 0)}, "1099511627776 ranks"),
    ],
)
def test_bad_gradients_are_refused(grads: dict, word: str) -> None:
    with pytest.raises(thinwire.Error, match=word) as caught:
        replay("dgc", grads)
    assert caught.value.code == "invalid_argument"
    assert ".cpp" not in str(caught.value) and "()" not in str(caught.value), "source code is no message"


def test_a_machine_without_threads(tmp_path: Path) -> None:
    """Ranks that could not all be started end; the process does not. Thread stacks are address space, which a limit takes away."""
    script = """
import resource, threading, torch, thinwire
grads = {"w": torch.ones(2, 300, 8, 8)}
thinwire.replay("dgc min_numel=0", {"w": grads["w"][:, :2].clone()})  # everything is loaded
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20, resource.RLIM_INFINITY))
try:
    thinwire.replay("dgc min_numel=0 timeout=60", grads)
except thinwire.Error as error:
    print(error.code, error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert done.stdout.startswith("unsupported replay: this machine has no thread for rank"), done.stdout


def test_bad_config_is_refused() -> None:
    with pytest.raises(thinwire.Error, match="a Config or a string, not int"):
        replay(4, {"w": torch.ones(1, 1, 2)})
    with pytest.raises(thinwire.ConfigError, match="density"):
        replay("dgc:density=7", {"w": torch.ones(1, 1, 2)})
