"""Results side by side: the report, comparisons and lineage."""
