"""Parameter-free transforms from packed SIDs to table rows."""
