#!/usr/bin/env python3
"""Breaks groups of MPI ranks and checks that nothing hangs and that the survivors say what happened.

usage: check_failures.py PROGRAM [--mpirun MPIRUN]
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time

DEADLINE = 60.0  # seconds for one job; the longest legitimate one takes about 6

# mode, ranks, what every surviving rank must say (None: mpirun ends the job before they can)
CASES = [
    ("stalled", 2, r"timeout after \d+ ms: mpi rank {r} of 2: all_reduce: timed out: rank {r} waited 1000 ms in all_reduce"),
    ("stalled", 3, r"timeout after \d+ ms: mpi rank {r} of 3: all_reduce: timed out"),
    ("killed", 2, None),
    ("killed", 4, None),
    ("abort", 2, r"peer_lost after \d+ ms: mpi rank {r} of 2: all_reduce: rank 1 aborted: corrupt payload of bucket 7"),
    ("abort", 4, r"peer_lost after \d+ ms: mpi rank {r} of 4: all_reduce: rank 3 aborted: corrupt payload of bucket 7"),
    ("abort-funneled", 3, r"peer_lost after \d+ ms: mpi rank {r} of 3: all_reduce: rank 2 aborted: closing"),
    ("mismatch", 2, r"(transport|timeout|peer_lost) after \d+ ms: mpi rank {r} of 2: all_reduce"),
    ("finalized", 3, r"invalid_argument after \d+ ms: all_reduce: MPI is not running"),
]
# A reducer's queue thread is in the call that breaks. The deadline is 3 s, of "closed" 60.
CONFIGS = [
    "codec=topk:density=0.01 feedback=ef14 exchange=gather min_numel=1",
    "codec=sign feedback=ef14 exchange=two_phase min_numel=1",
]
LOST = r"(timeout|peer_lost) after \d+ ms: rank {r}, step 2, bucket "
CLOSED = r"peer_lost after \d+ ms: rank {r}: the reducer was closed"
for config in CONFIGS:
    CASES += [
        (f"reducer-stalled {config}", 3, LOST),
        (f"reducer-closed {config}", 2, CLOSED),
        (f"reducer-destroyed {config}", 3, rf"({LOST}|{CLOSED})"),
        (f"reducer-killed {config}", 3, None),
    ]


def run(mpirun, program, mode, ranks):
    """Returns (exit status, output, seconds); a job over the deadline is killed with all it started and has status None."""
    env = dict(os.environ, OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1", OMPI_MCA_mpi_yield_when_idle="1")
    command = [mpirun, "-np", str(ranks), "--oversubscribe", "--bind-to", "none", program, *mode.split(" ", 1)]
    start = time.monotonic()
    job = subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        output, _ = job.communicate(timeout=DEADLINE)
        status = job.returncode
    except subprocess.TimeoutExpired:
        job.terminate()  # mpirun then ends its ranks, which lead process groups of their own
        try:
            output, _ = job.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            output, _ = job.communicate()
        status = None
    return status, output, time.monotonic() - start


def problems(mode, ranks, says, status, output):
    if status is None:
        return [f"hung: still running after {DEADLINE:.0f} s"]
    found = []
    if (status == 0) != (mode == "finalized"):
        found.append(f"exit status {status}")
    silent = [ranks - 1] if mode == "stalled" or mode.startswith("reducer-") else []
    for r in range(ranks) if says else ():
        if r in silent:
            continue
        if not re.search(f"rank {r}: " + says.format(r=r), output):
            found.append(f"rank {r} did not say /{says.format(r=r)}/")
        if not re.search(f"rank {r}: destroyed", output):
            found.append(f"rank {r} did not get past the destructor")
        if f"rank {r}: a broken reducer went on" in output:
            found.append(f"rank {r} took a step after the error")
        took = re.search(rf"rank {r}: (?:\w+ after|destroyed within) (\d+) ms", output)
        if took and int(took[1]) > 20000:
            found.append(f"rank {r} needed {took[1]} ms")  # the deadlines are 1 to 3 s; without a notice an abort would take 60
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program")
    parser.add_argument("--mpirun", default="mpirun")
    options = parser.parse_args()
    failed = 0
    for mode, ranks, says in CASES:
        status, output, seconds = run(options.mpirun, options.program, mode, ranks)
        found = problems(mode, ranks, says, status, output)
        print(f"{'FAILED' if found else 'ok':7}{mode} on {ranks} ranks, {seconds:.1f} s", *found, sep="\n        ", flush=True)
        if found:
            print(output)
            failed += 1
    print(f"{len(CASES) - failed} of {len(CASES)} failures handled")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
