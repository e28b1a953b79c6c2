"""Describe the package on PyPI by README.md, with links that lead into the repository."""

import re
from pathlib import Path

from setuptools import setup

REPOSITORY = "https://github.com/captum-mipin/captum-mipin"

text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
text = re.sub(r"(!\[[^\]]*\])\((?!https?:)", rf"\1({REPOSITORY}/raw/main/", text)
text = re.sub(r"(?<!!)(\[[^\]!]*\])\((?!https?:|#)", rf"\1({REPOSITORY}/blob/main/", text)

setup(long_description=text, long_description_content_type="text/markdown")
