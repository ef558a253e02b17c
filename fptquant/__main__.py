"""``python -m fptquant``: what was built and chosen on this machine; with arguments, the command line."""

from __future__ import annotations

import sys

from fptquant.cli import main

if __name__ == "__main__":
    if len(sys.argv) == 1:
        from fptquant.diagnostics import print_diagnostics

        print_diagnostics()
    else:
        main()
