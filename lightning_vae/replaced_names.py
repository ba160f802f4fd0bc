"""Removed public names of earlier versions, and their replacements."""

from __future__ import annotations

_CONFIGURABLE = {
    "BestCheckpoint": "Lightning's ModelCheckpoint with `monitor: val/loss` and `filename: best`",
    "FlushedCurves": "FlushLoggers",
    "MutualInformation": "ObservationSubset of `lightning_vae.estimators`, and mutual_information of its rows",
    "NullProfiler": "the Trainer's own default, by leaving `profiler` out",
    "QuickTensorBoardLogger": "Lightning's TensorBoardLogger",
    "ScheduledKnob": "AttributeScheduler",
}
"""Names that a config could use, also without a module path."""
_IMPORTED = {
    "Attribute": "AttributePath",
    "Diagnosis": "CollapseState",
    "PosteriorReader": "DistributionReader",
    "diagnose": "collapse_state",
}


def advice(path: str) -> str | None:
    """Return advice on what replaces a removed name.

    Args:
        path: The dotted path of an import, or the class name that a config gives.

    Returns:
        A sentence, or ``None`` for any other name, and for those of other packages.

    Example::

        >>> advice("lightning_vae.FlushedCurves")
        '`FlushedCurves` is gone: use FlushLoggers.'
    """
    package, _, name = path.rpartition(".")
    if package.partition(".")[0] not in ("", "lightning_vae"):
        return None
    replacements = _CONFIGURABLE | _IMPORTED if package else _CONFIGURABLE
    return f"`{name}` is gone: use {replacements[name]}." if name in replacements else None
