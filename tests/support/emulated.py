"""Importing this first makes a process take the branches of a GPU machine; a pytest plugin for complete test files too.

python -m pytest -p tests.support.emulated tests/parallel/test_megatron_layouts.py
"""

from tests import ranks
from tests.support import emulation

emulation.install()
ranks.PRELOAD.insert(0, __name__)
