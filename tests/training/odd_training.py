"""finetune.py under odd conditions: `python odd_training.py DTYPE KILL ARGUMENTS`.

DTYPE: "float32" or "float64", the precision of the network. KILL: the process dies by SIGKILL when it is about to
rename a file for the KILL-th time, in the middle of a save (0: never). This moment does not depend on the machine's
speed.

Two lists in the environment have a value for each of several processes: UNITS, whether its processor has units for bf16
(1 or 0), and THREADS, with how many threads it computes.
"""

import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from finetune import main

dtype, renames_left, replace = sys.argv[1], int(sys.argv[2]), os.replace


def counted_replace(source, target):
    global renames_left
    renames_left -= 1
    if renames_left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)


def value_of_this_process(name):
    """Return this process's value in the list of that name, None without such a list."""
    values = os.environ.get(name)
    return values and int(values.split(",")[int(os.environ.get("RANK", 0))])


if (units := value_of_this_process("UNITS")) is not None:
    torch.cpu.get_capabilities = lambda: {"avx512_bf16": bool(units)}
if (threads := value_of_this_process("THREADS")) is not None:
    torch.set_num_threads(threads)
torch.set_default_dtype(getattr(torch, dtype))
os.replace = counted_replace
sys.exit(main(sys.argv[3:]))
