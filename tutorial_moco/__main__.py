import sys

from tutorial_moco.cli import main

sys.exit(main())
