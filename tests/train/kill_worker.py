"""One process of test_train_kill.py: a run, whose disk takes its time where asked for, or has room for so much only."""

from __future__ import annotations

import os
import resource
import sys
import time

from pyllm import train_run
from pyllm.train_config import TrainConfig


def main(config: str, slow_disk: float, largest_file: int) -> None:
    train_run.machine.matmul_peak = lambda *_: 1e11  # not what is tested here
    train_run.picture = lambda *_: ""
    if slow_disk:
        sync, replace = os.fsync, os.replace

        def slowly(call):
            def wrapped(*args):
                time.sleep(slow_disk)
                call(*args)
                time.sleep(slow_disk)

            return wrapped

        os.fsync, os.replace = slowly(sync), slowly(replace)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    try:
        train_run.run(TrainConfig.read(config, {}))
    except OSError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
