"""launch/cache.py, in which rank 1 gets SIGUSR1 when it puts its 20th batch, in its third shard.

Not a test: test_signals.py runs it.
"""

import os
import signal
import sys

from launch.cache import main
from pipeline.steps.cache.writing import WriterThread

put, calls = WriterThread.put, []


def counted_put(self, *arguments):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 20:
        os.kill(os.getpid(), signal.SIGUSR1)
    return put(self, *arguments)


WriterThread.put = counted_put
sys.exit(main())
