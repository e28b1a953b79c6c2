"""``python -m captum_mipin``: the command line."""

from captum_mipin.cli.main import main

raise SystemExit(main())
