"""Slot moves, page copies and page clears, in all blocks at once."""
