"""python -m bench.ladder"""

from bench.ladder.run import main

main()
