"""``python -m captum_mipin``: the command line."""

from captum_mipin.cli import main

raise SystemExit(main())
