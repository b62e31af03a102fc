"""Whether a recorder watches this thread, so that ops are seen as the registered ops they are.

Kernels that are called with addresses are invisible to torch's dispatcher; a registered op is not.
"""

from __future__ import annotations

import threading


class _Recording(threading.local):
    on: bool = False


state = _Recording()
