"""CFG++ forms. See first_order.py for the form of an oracle."""
