"""One module per question; each measures ours beside its rivals in one run and writes JSON."""
