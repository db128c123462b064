"""The tiny runs are those of the trainer's own tests."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "integrations"))
