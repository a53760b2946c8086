"""Redis only: every job, lease and token stream. Knows neither api nor engine."""
