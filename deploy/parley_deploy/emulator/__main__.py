"""`python -m parley_deploy.emulator`."""

import sys

from parley_deploy.emulator.machine import main

sys.exit(main())
