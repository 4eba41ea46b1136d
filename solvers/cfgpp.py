"""CFG++ forms."""
