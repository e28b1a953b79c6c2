"""A figure that notebooks show by themselves. Imported where one is drawn, since matplotlib is optional."""

import io

from matplotlib import figure


class Figure(figure.Figure):
    """A figure of matplotlib that pyplot, which notebooks ask for what to show, knows nothing of."""

    def _repr_png_(self) -> bytes:
        """What notebooks show of it."""
        found = io.BytesIO()
        self.savefig(found, format="png")
        return found.getvalue()
