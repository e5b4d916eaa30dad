"""Tiles of the split tables, which these tests share with the simulator's, lie beside those."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "sim"))
