"""Where a result lives and who works on it: stages on disk, their locks and lineage, the registry."""
