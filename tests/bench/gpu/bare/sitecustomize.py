"""A bare machine, as far as Python sees: of the installed packages only those named in ONLY_PACKAGES can be imported.

Not a test: test_check_gpu_twin.py puts this folder onto PYTHONPATH, and Python imports this file when it starts.
"""

import os
import sys
from importlib.machinery import PathFinder

ALLOWED = set(os.environ["ONLY_PACKAGES"].split())


class OnlyAllowed(PathFinder):
    """Finds what PathFinder finds, but for other installed packages."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        found = super().find_spec(name, path, target)
        if found is None or path is not None or name in ALLOWED:
            return found
        places = [found.origin or "", *(found.submodule_search_locations or [])]
        return None if any("site-packages" in place for place in places) else found


sys.meta_path[sys.meta_path.index(PathFinder)] = OnlyAllowed
