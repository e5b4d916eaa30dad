"""Importers of other tools' routing records; the format is told from the content.

A placement, a balance log or a model file is recognised too, and refused with a sentence that says what it is.
"""

from .registry import FORMATS, Format, ImportResult, detect, import_trace
from .result import ImportOptions

__all__ = ["FORMATS", "Format", "ImportOptions", "ImportResult", "detect", "import_trace"]
