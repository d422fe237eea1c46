"""python -m bench.gpu"""

import sys

from bench.gpu.needs import missing, old

if lacking := missing():
    sys.exit(
        f"make check-gpu: missing here: {', '.join(lacking)}. Put wheels of all of them into the folder WHEELS (.whl): "
        'docs/check_gpu.md, "What it needs"'
    )
if aged := old():
    print(f"make check-gpu: tested with other versions, which may matter: {', '.join(aged)}")
from bench.gpu.run import main  # needs some of them

sys.exit(main())
