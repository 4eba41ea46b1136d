"""Adams-Bashforth family on the noise prediction. See first_order.py for the form of an oracle."""
