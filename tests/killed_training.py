"""finetune.py in a process that kills itself: `python killed_training.py N ARGUMENTS`.

It dies with SIGKILL when it is about to give a file its name for the N-th time, in the middle of a save: where that
is does not depend on how fast the machine is.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from finetune import main

left, replace = int(sys.argv[1]), os.replace


def counted(source, target):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)


os.replace = counted
sys.exit(main(sys.argv[2:]))
