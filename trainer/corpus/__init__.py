"""Where text comes from: one small file per kind of source."""
