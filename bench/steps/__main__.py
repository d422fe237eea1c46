"""python -m bench.steps"""

from bench.steps.run import main

main()
