"""torchrun that hands signals on to its workers and ends with their exit code.

torchrun by itself ends with 1 whatever its workers say, and stops them in a hurry when it is told
to stop. Here SIGTERM and SIGUSR1 reach the trainer, which saves and ends with a code of its own;
whoever started the run reads that code (slurm.sbatch).

python scripts/training/lib/torchrun.py [torchrun's arguments] SCRIPT [the script's arguments]
"""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

HANDED_ON = (signal.SIGTERM, signal.SIGUSR1)
KEPT = "SIGINT,SIGHUP,SIGQUIT"
"""What torchrun itself acts on."""


def hand_on(number: int, _: FrameType | None) -> None:
    process = os.getpid()
    for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
        with suppress(ProcessLookupError):
            os.kill(int(child), number)


if __name__ == "__main__":
    for handed_on in HANDED_ON:
        signal.signal(handed_on, hand_on)
    try:
        main([f"--signals_to_handle={KEPT}", *sys.argv[1:]])
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        sys.exit(code if code > 0 else 128 - code)  # a signal's number is negative here
