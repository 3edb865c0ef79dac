"""With this folder on PYTHONPATH films come from a slow store: each step waits LMP_TEST_STEP_SECONDS for its data.

So an event hits the middle of a tiny run, at little cost of computing.
Python imports this file by its name at every start.
"""

import importlib.abc
import importlib.util
import os
import sys
import time


class _SlowFilms(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "lmp.data.loader":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_slow(module):
            load(module)
            read = module.PackLoader.__next__

            def read_slowly(loader):
                time.sleep(float(os.environ["LMP_TEST_STEP_SECONDS"]))
                return read(loader)

            module.PackLoader.__next__ = read_slowly

        spec.loader.exec_module = load_and_slow
        return spec


sys.meta_path.insert(0, _SlowFilms())
