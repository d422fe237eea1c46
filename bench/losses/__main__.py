"""python -m bench.losses"""

from bench.losses.run import main

main()
