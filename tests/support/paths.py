"""Folders of the source tree."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
CONFIGS = ROOT / "configs"
PACKAGE = ROOT / "prcl_fast"
GOLDEN = TESTS / "golden" / "prcl_official.npz"
