"""Ridge regression from moments or from rows. This package knows no networks."""
