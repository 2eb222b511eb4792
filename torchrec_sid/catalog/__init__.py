"""The catalog: item id -> Semantic ID, with drift between catalogs and an optional last digit."""

from torchrec_sid.catalog.drift import DriftReport, ItemValues, measure_drift
from torchrec_sid.catalog.last_digit import LastDigit, add_last_digit
from torchrec_sid.catalog.sid_catalog import CatalogRows, SidCatalog

__all__ = [
    "CatalogRows",
    "DriftReport",
    "ItemValues",
    "LastDigit",
    "SidCatalog",
    "add_last_digit",
    "measure_drift",
]
