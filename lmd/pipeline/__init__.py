"""The ordered notebooks, run headlessly, and the report of a run."""
