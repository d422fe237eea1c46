"""launch/train.py, in which the picture of one sample, named by the environment variable NAN_KEY, is not a number.

Waiting for data is told of 4 updates: the run is too short for 20. Not a test: test_non_finite.py runs it.
"""

import os
import sys
from dataclasses import replace

from launch.train import main
from pipeline.runtime.data import data_wait
from pipeline.vlm.processing import ChatEncoder

encode = ChatEncoder.__call__


def encode_one_as_nan(self, key, *arguments):
    encoded = encode(self, key, *arguments)
    if key != os.environ["NAN_KEY"]:
        return encoded
    return replace(encoded, inputs=encoded.inputs | {"pixel_values": encoded.inputs["pixel_values"] * float("nan")})


ChatEncoder.__call__ = encode_one_as_nan
data_wait.WINDOW, data_wait.NOTICEABLE = 4, 0.001
sys.exit(main())
