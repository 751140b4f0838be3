"""`python -m ifprune_chat [MODEL]`, and where Briefcase's launcher begins."""

import sys

from ifprune_chat.app import main

sys.exit(main(sys.argv[1:]))
