"""Version of the installed package, and the oldest versions of others that it works with."""

import re
from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("lightning-vae")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

OLDEST = {"torch": "2.6", "lightning": "2.5", "torchmetrics": "1.6"}


def check_versions() -> None:
    """Refuse versions of other packages that are too old, as they would fail in the middle of a run.

    Raises:
        ImportError: If an installed package is too old.
    """
    for package, oldest in OLDEST.items():
        try:
            installed = version(package)
        except PackageNotFoundError:  # importing it will say so
            continue
        if _numbers(installed) < _numbers(oldest):
            raise ImportError(
                f"lightning_vae needs {package} {oldest} or newer, but {installed} is installed: "
                f"pip install '{package}>={oldest}'."
            )


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)[:2]]
