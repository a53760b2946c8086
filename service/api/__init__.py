"""HTTP only: parses requests, admits jobs, follows their streams. Knows no engine."""
