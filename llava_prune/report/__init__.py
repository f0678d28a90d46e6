"""Reports on finished runs: the store of results, tables, figures and pages. This package only reads files."""
