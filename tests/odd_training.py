"""finetune.py under odd conditions: `python odd_training.py DTYPE KILL ARGUMENTS`.

DTYPE ("float32", "float64"): the numbers that the network computes in. KILL: the process dies with SIGKILL when it is
about to give a file its name for the KILL-th time, in the middle of a save (0: never). Where that is does not depend
on how fast the machine is.
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


torch.set_default_dtype(getattr(torch, dtype))
os.replace = counted
sys.exit(main(sys.argv[3:]))
