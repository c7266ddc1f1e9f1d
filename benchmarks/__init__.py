"""Speed, always as a ratio within one run. Nothing here is a test."""
