# SPDX-License-Identifier: LGPL-2.1-or-later
"""Leaves out the tests of device trees where nothing can read one.

dtc and libfdt's Python module are not on every machine, and PyPI has the latter as source only.
Debian 13's packages have both, so ``make unit-debian`` always runs these tests.
"""

import importlib.util
import shutil

collect_ignore_glob = (
    []
    if shutil.which("dtc") and importlib.util.find_spec("libfdt")
    else ["test_config_devicetree_*.py", "test_config_devicetree.py", "test_config_artefacts*.py"]
)

pytest_plugins = ("descriptors", "finder_host", "store_words")
"""Modules whose fixtures several test modules use."""
