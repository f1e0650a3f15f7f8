"""Freed memory is kept: asking for it again takes no page from the system."""

import platform
import subprocess
import sys

import pytest
from conftest import ROOT

CODE = """
import resource, sys, torch
from model import keep_freed
keep_freed(sys.argv[1] == "kept")
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(20_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
# Small blocks may take the first place that it left.
print(min(faults() for _ in range(12)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_freed_memory_is_kept() -> None:
    def faults(how: str) -> int:
        command = [sys.executable, "-c", CODE, how]
        return int(subprocess.run(command, capture_output=True, check=True, cwd=ROOT).stdout)

    assert faults("kept") < 0.1 * faults("given back")
