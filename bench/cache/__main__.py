"""python -m bench.cache"""

from bench.cache.run import main

main()
