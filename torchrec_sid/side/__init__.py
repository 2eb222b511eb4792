"""SIDE: parameter-free features of a SID, and attention over histories of packed codes."""
