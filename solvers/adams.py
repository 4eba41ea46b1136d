"""Adams-Bashforth family on the noise prediction."""
