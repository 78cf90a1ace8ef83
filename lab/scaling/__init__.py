"""Do tricks survive at larger sizes: ladders, laws, verdicts, plans."""
