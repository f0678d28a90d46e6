"""Reports on finished runs: the store of results, tables, figures. Reads files only."""
