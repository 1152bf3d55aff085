"""finetune.py under odd conditions: `python odd_training.py DTYPE KILL ARGUMENTS`.

DTYPE ("float32", "float64"): the numbers that the network computes in. KILL: the process dies with SIGKILL when it is
about to give a file its name for the KILL-th time, in the middle of a save (0: never). Where that is does not depend
on how fast the machine is.

Of several processes each may be told its own, by a list in the environment: UNITS, whether its processor has units for
bf16 (1 or 0), and THREADS, how many threads it computes with.
"""

import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from finetune import main

dtype, left, replace = sys.argv[1], int(sys.argv[2]), os.replace


def counted(source, target):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)


def own(name):
    """Return this process's place in the list of that name, None without such a list."""
    values = os.environ.get(name)
    return values and int(values.split(",")[int(os.environ.get("RANK", 0))])


if (units := own("UNITS")) is not None:
    torch.cpu.get_capabilities = lambda: {"avx512_bf16": bool(units)}
if (threads := own("THREADS")) is not None:
    torch.set_num_threads(threads)
torch.set_default_dtype(getattr(torch, dtype))
os.replace = counted
sys.exit(main(sys.argv[3:]))
