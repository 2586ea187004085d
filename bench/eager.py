"""The fused step beside the same step as torch's eager operations: one thread, the same gradient, arrays of one arena, the same repetitions."""

import ctypes
import os
import pathlib
import statistics
import time

import numpy
import torch


def library():
    folder = pathlib.Path(os.environ["THINWIRE_BUILD"]) / "bench"
    lib = ctypes.CDLL(str(next(folder.glob("libthinwire_bench_step.*"))))
    size, real, pointer = ctypes.c_size_t, ctypes.c_double, ctypes.c_void_p
    for name, result, arguments in (
        ("open", pointer, [ctypes.c_char_p, size, real, ctypes.c_char_p]),
        ("close", None, [pointer]),
        ("isa", ctypes.c_char_p, [pointer]),
        ("run", real, [pointer, size]),
        ("copy", real, [pointer]),
        ("axpy", real, [pointer]),
        ("density", real, [pointer]),
        ("bytes", real, [pointer]),
        ("array", ctypes.POINTER(ctypes.c_float), [pointer, ctypes.c_int, size]),
    ):
        function = getattr(lib, f"thinwire_step_{name}")
        function.restype, function.argtypes = result, arguments
    return lib


def eager_dgc(grad, u, v, threshold):
    """u = m u + g; v = v + u; entries above the threshold leave, and leave no momentum."""
    u.mul_(0.9).add_(grad)
    v.add_(u)
    mask = v.abs().gt(threshold)
    index = mask.nonzero().squeeze(1)
    values = v[index]
    v.masked_fill_(mask, 0)
    u.masked_fill_(mask, 0)
    return index, values


def eager_ef14(grad, _, residual, threshold):
    residual.add_(grad)
    mask = residual.abs().gt(threshold)
    index = mask.nonzero().squeeze(1)
    values = residual[index]
    residual.masked_fill_(mask, 0)
    return index, values


def packed_by_numpy(positive):
    return numpy.packbits(positive.numpy(), bitorder="little")


def packed_by_torch(positive):
    """The same bytes where the bits are, on a GPU too. The number of bits is a multiple of 8, as DeepSpeed pads it."""
    weights = torch.ones(8, dtype=torch.uint8, device=positive.device) << torch.arange(8, dtype=torch.uint8, device=positive.device)
    return (positive.view(-1, 8) * weights).sum(dim=1, dtype=torch.uint8)


def eager_ef14_sign(grad, _, residual, __, pack=packed_by_numpy):
    """The worker's half of a DeepSpeed-style step as a sequence of operations, each a pass over memory: error in, norm, signs with sign(0) = +1, what they decode
    to, error out, bits."""
    message = torch.add(grad, residual)
    scale = message.norm() / message.numel() ** 0.5
    decoded = message.sign().add_(1).bool().float().add_(-0.5).mul_(2.0).mul_(scale)
    torch.sub(message, decoded, out=residual)
    return pack(message.sign_().add_(1).bool()), scale


def threshold_for(recursion, grad, u, v, density):
    """What torch is given for nothing: the threshold that this share of the next message exceeds, from every 61st element."""
    grad, u, v = grad[::61], u[::61], v[::61]
    message = v + (0.9 * u + grad if recursion == "dgc" else grad)
    return message.abs_().kthvalue(max(1, round(message.numel() * (1 - density)))).values.item()


def measure(recursion, numel, repetitions, isa, density=0.005):
    """@returns the rows of both, and the median of the paired time ratios. The eager step is given its threshold; ours finds its own. `recursion`_sign has none."""
    sign = recursion.endswith("_sign")
    torch.set_num_threads(1)
    lib = library()
    step = lib.thinwire_step_open(recursion.encode(), numel, density, isa.encode())
    if not step:
        raise SystemExit(1)

    def tensor(which, repetition=0):
        return torch.from_numpy(numpy.ctypeslib.as_array(lib.thinwire_step_array(step, which, repetition), (numel,)))

    eager = {"dgc": eager_dgc, "ef14": eager_ef14, "ef14_sign": eager_ef14_sign}[recursion]
    warm_up = 3
    for repetition in range(warm_up):
        if lib.thinwire_step_run(step, repetition) < 0:
            raise SystemExit(1)
    u, v = tensor(3), tensor(4)
    u.copy_(tensor(1))
    v.copy_(tensor(2))

    ours, theirs, rates = [], [], []
    densities = {"ours": [], "eager": []}
    for repetition in range(warm_up, warm_up + 1 + repetitions):
        our_seconds = lib.thinwire_step_run(step, repetition)
        grad = tensor(0, repetition)
        threshold = None if sign else threshold_for(recursion, grad, u, v, density)
        start = time.thread_time()
        index, _ = eager(grad, u, v, threshold)
        eager_seconds = time.thread_time() - start
        if repetition == warm_up:  # torch's first step pays for its memory
            continue
        ours.append(our_seconds)
        theirs.append(eager_seconds)
        if not sign:
            densities["ours"].append(lib.thinwire_step_density(step))
            densities["eager"].append(index.numel() / numel)
        rates.append((8 * numel / lib.thinwire_step_copy(step), 12 * numel / lib.thinwire_step_axpy(step)))
    bytes_per_element = lib.thinwire_step_bytes(step)
    used = lib.thinwire_step_isa(step).decode()
    lib.thinwire_step_close(step)

    def row(kernel, name, seconds, reached):
        rate = [bytes_per_element * numel / s for s in seconds]
        middle = statistics.median(seconds)
        return {
            "kernel": kernel, "isa": name, "backend": "cpu", "numel": numel, "density": statistics.mean(reached) if reached else None, "bytes_per_element": bytes_per_element,
            "seconds_median": middle, "seconds_min": min(seconds), "gb_per_s": bytes_per_element * numel / middle * 1e-9,
            "ratio_memcpy": statistics.median(r / copy for r, (copy, _) in zip(rate, rates)),
            "ratio_axpy": statistics.median(r / axpy for r, (_, axpy) in zip(rate, rates)),
        }  # fmt: skip

    rows = [
        row(f"{recursion}{'' if sign else '_topk_sampled'}_beside_eager", used, ours, densities["ours"]),
        row(f"{recursion}_eager", None, theirs, densities["eager"]),
    ]
    return rows, statistics.median(b / a for a, b in zip(ours, theirs))
