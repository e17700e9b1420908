"""The page of a run, and figures of runs: reading workdirs, curves, the page, figures."""
