"""finetune.py under odd conditions: `python odd_training.py DTYPE KILL ARGUMENTS`.

- DTYPE: "float32" or "float64", the precision of the network.
- KILL: the process kills itself by SIGKILL within its KILL-th save of a training's state, just before the state gets
  its name; 0 for never.

Two lists in the environment have a value for each process: UNITS (1 or 0: whether its processor has units for bf16) and
THREADS (the number of threads it computes with).
"""

import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from finetune import main
from training.checkpoints import STATE

dtype, saves_left, replace = sys.argv[1], int(sys.argv[2]), os.replace


def replace_or_die(source, target):
    global saves_left
    saves_left -= Path(target).name == STATE
    if saves_left == 0 and Path(target).name == STATE:
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
os.replace = replace_or_die
sys.exit(main(sys.argv[3:]))
