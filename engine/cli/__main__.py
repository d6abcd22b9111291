"""Run the ``ssast`` command as a module: ``python -m ssast.engine.cli``, for launchers."""

import sys

from ssast.engine.cli.main import main

sys.exit(main())
