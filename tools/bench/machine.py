"""What machine measures, and whether it had time for it."""

import ctypes
import os
import pathlib
import platform
import resource
import time

# What CPU engines choose their kernels by.
ISA = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_tile")


def facts():
    info = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    fields = dict(reversed([line.partition("\t: ")[::2] for line in info if "\t: " in line]))
    fields = {name.strip(): value for name, value in fields.items()}
    flags = fields.get("flags", fields.get("Features", "")).split()
    return {
        "cpu": fields.get("model name", platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "isa": [flag for flag in ISA if any(found.startswith(flag) for found in flags)],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
    }


class Others:
    """How much of the cores' time went to anyone else (proc_stat(5), getrusage(2)).

    Children count as ours once they have been waited for, so `share` comes after their end. Time
    that the hypervisor stole counts as others'.
    """

    def __init__(self):
        self.begun, self.busy, self.ours = time.monotonic(), busy_seconds(), our_seconds()

    def share(self):
        seconds = (time.monotonic() - self.begun) * os.cpu_count()
        others = (busy_seconds() - self.busy) - (our_seconds() - self.ours)
        return max(others, 0.0) / seconds


def adopt_orphans():
    """Makes processes whose parent is gone children of this one, so that their time is ours.

    prctl(2), PR_SET_CHILD_SUBREAPER.
    """
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)


def reap():
    """Waits for such processes, which have been told to end, for at most ten seconds."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.05)
        except ChildProcessError:
            return


def busy_seconds():
    line = pathlib.Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(n) for n in line[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def our_seconds():
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def wait_until_quiet(limit, seconds):
    """Looks every two seconds, for at most so many, until others take no more than `limit`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        others = Others()
        time.sleep(2)
        if others.share() <= limit:
            return
