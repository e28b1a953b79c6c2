"""Ridge regression from moments or from rows. This package does not depend on networks."""
