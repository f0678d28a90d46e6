"""Plain data types, selection and budget mathematics. Depends on torch only."""
